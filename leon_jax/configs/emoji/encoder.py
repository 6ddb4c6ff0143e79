"""The shipped retrieval encoder: a CLIP for 48 px images, small enough for two CPU cores.

    leon train --config=configs/emoji/encoder.py --workdir=runs/emoji/encoder

Reads the documents of configs/emoji/designs.py and the text tokenizer. docs/retrieval.md has the
results.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the configuration of `leon_jax.train.retrieval_encoder`."""
    data = {"folder": "data/emoji_designs", "text": "runs/emoji/text/export/text.json"}
    return ConfigDict({**stage(), "data": data})


def stage() -> dict:
    """Returns the configuration without the data, which the pipeline sets."""
    steps = 2000
    return {
        "kind": "encoder",
        "seed": 0,
        "steps": steps,
        "batch_size": 128,
        # Two designs of a concept, so that the encoder ignores the design.
        "views": 2,
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
                "vocab_size": 0,  # that of the text tokenizer
                "width": 128,
                "layers": 2,
                "heads": 2,
            },
            "embed_dim": 128,
        },
        "products": "auto",
        # Some emoji show text or a direction, so none is mirrored.
        "augment": {"zoom": 0.2, "shift": 0.08, "mirror": 0.0},
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
        "loop": {"save_every": 200, "eval_every": 200},
    }
