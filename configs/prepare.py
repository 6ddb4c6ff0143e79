"""One's own data, prepared for training: a file to copy, showing every kind of choice.

    leon prepare --config=configs/prepare.py --out=data/mine

Keys that are left out take the defaults of `leon_jax.prepare.config.PrepareConfig`. Paths are
relative to the folder where the command is given.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            # Each source becomes part of a split; all splits but train are held out.
            "sources": [
                {
                    "kind": "webdataset",
                    "path": "shards/*.tar",
                    "name": "my photographs",
                    # For records that state no licence. Without it they are refused.
                    "licence": "CC-BY-4.0",
                    "attribution": "Photographs by A. Person, CC BY 4.0",
                },
                {"kind": "jsonl", "path": "drawings", "licence": "CC0-1.0"},
                {"kind": "jsonl", "path": "exam.jsonl", "split": "exam", "licence": "CC0-1.0"},
            ],
            # Model files: a trained VQ-GAN, OpenAI's CLIP as Hugging Face lays it out, and the
            # text tokenizer that the decoder will use. Without these three lines: the small models
            # that come with the package.
            "tokenizer": "runs/tokenizer/export/tokenizer.safetensors",
            "encoder": "models/clip-vit-base-patch32",
            "text": "runs/text/export/text.json",
            "licences": ["CC0-1.0", "CC-BY-4.0", "LicenseRef-contract-17"],
            "min_side": 256,
            "max_aspect": 3.0,
            "max_tokens": 1400,
            # Thresholds are properties of the encoder; these suit CLIP ViT-B/32.
            "duplicates": {"exact": True, "near": 0.97, "evaluation": 0.95},
        }
    )
