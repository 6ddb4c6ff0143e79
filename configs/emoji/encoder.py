"""The demo's retrieval encoder: a CLIP for 48 px images, small enough for two CPU cores.

    leon train --config=configs/emoji/encoder.py --workdir=runs/emoji/encoder

docs/retrieval.md has the results.
"""

from ml_collections import ConfigDict

TEXT_SIZE = 2048  # entries of runs/emoji/text; the encoder adds padding, start and end


def get_config() -> ConfigDict:
    steps = 1600
    return ConfigDict(
        {
            "kind": "encoder",
            "seed": 0,
            "steps": steps,
            "batch_size": 128,
            "model": {
                "vision": {
                    "image_size": 48,
                    "patch_size": 8,
                    "width": 192,
                    "layers": 4,
                    "heads": 3,
                    "stem": "convolution",
                },
                "text": {
                    "context_length": 32,
                    "vocab_size": TEXT_SIZE + 3,
                    "width": 128,
                    "layers": 2,
                    "heads": 2,
                },
                "embed_dim": 128,
            },
            "augment": {"zoom": 0.2, "shift": 0.08},
            "optimizer": {
                "learning_rate": 1e-3,
                "warmup_steps": 50,
                "total_steps": steps,
                "schedule": "cosine",
                "final_fraction": 0.02,
                "beta1": 0.9,
                "beta2": 0.98,
                "weight_decay": 0.1,
            },
            "data": {"dir": "data/emoji", "text": "runs/emoji/text/export/text.json"},
            "loop": {},
        }
    )
