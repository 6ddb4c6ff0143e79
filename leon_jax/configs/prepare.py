"""An example config of `leon prepare` for your own data, to copy and edit.

    leon prepare --config=configs/prepare.py --out=data/my_dataset

Missing keys have the defaults of `leon_jax.prepare.config.PrepareConfig` and
`leon_jax.prepare.encode.EncodeConfig`. The documents are encoded too, because the file names the
models. Paths are relative to the current folder.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            # Each source belongs to a split. All splits but train are held out.
            "sources": [
                {
                    "kind": "webdataset",
                    "path": "shards/*.tar",
                    "name": "my photographs",
                    # The licence of records that have none. Without it they are rejected.
                    "licence": "CC-BY-4.0",
                    "attribution": "Photographs by A. Person, CC BY 4.0",
                },
                {"kind": "jsonl", "path": "drawings", "licence": "CC0-1.0"},
                {"kind": "jsonl", "path": "exam.jsonl", "split": "exam", "licence": "CC0-1.0"},
            ],
            # Model files: a trained VQ-GAN, OpenAI's CLIP in Hugging Face's layout, and the text
            # tokenizer of the decoder. Without these three keys the documents are not encoded.
            "tokenizer": "runs/tokenizer/export/tokenizer.safetensors",
            "encoder": "models/clip-vit-base-patch32",
            "text": "runs/text/export/text.json",
            "licences": ["CC0-1.0", "CC-BY-4.0", "LicenseRef-contract-17"],
            "min_side": 256,
            "max_aspect": 3.0,
            "max_tokens": 1400,
            # The thresholds depend on the encoder; these are for CLIP ViT-B/32.
            "duplicates": {"exact": True, "near": 0.97, "evaluation": 0.95},
        }
    )
