"""Fine-tunes the decoder of a model on images of your own, with the model's own tokenizers.

    leon pipeline --config=configs/finetune.py --from=models/cats --data=data/ten_images \
        --licence=CC-BY-4.0 --workdir=runs/ten_images

Without --from the shipped model is fine-tuned. Half of the examples come from the new images. The
other half come from the new images and the old index together, so that the model keeps what it
knows. Ten images need a few hundred steps; watch the sample images in WORKDIR/decoder/samples.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the configuration of `leon_jax.pipeline.finetune`."""
    steps = 300
    return ConfigDict(
        {
            "kind": "finetune",
            # A handful of images: none is held out.
            "prepare": {"held_out": 0.0},
            "encode": {"variants": 16},
            # Share of the examples that come from the new images alone.
            "share": 0.5,
            "decoder": {
                "kind": "decoder",
                "seed": 0,
                "steps": steps,
                "batch_size": 8,
                "loss_chunk": 512,
                "optimizer": {
                    "learning_rate": 2e-4,
                    "warmup_steps": 20,
                    "total_steps": steps,
                    "schedule": "cosine",
                    "final_fraction": 0.1,
                },
                "data": {"retrieved": (0.3, 0.4, 0.3), "unchanged": 0.5},
                "masking": {"placement": "segment", "whole_segment": 0.6, "query_text": 0.6},
                "loop": {"log_every": 10, "save_every": 100, "sample_every": 100},
            },
            "seconds": {"decoder": 150},
        }
    )
