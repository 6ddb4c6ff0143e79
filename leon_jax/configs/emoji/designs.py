r"""The emoji in five designs, 64 pixels wide: about 18,000 captioned images.

    npm install --prefix data/npm --ignore-scripts @iconify-json/noto@1.2.9 \
        @iconify-json/fluent-emoji-flat@1.2.6 @lobehub/fluent-emoji-3d@1.1.0 emojibase-data@17.0.0
    leon prepare --config=configs/emoji/designs.py --out=data/emoji_designs

docs/data_format.md describes the designs and the splits.
"""

from ml_collections import ConfigDict

SPLITS = ("train", "unseen_design", "unseen_concept")


def get_config() -> ConfigDict:
    """Returns the configuration of `leon_jax.prepare.config.PrepareConfig`."""
    return ConfigDict(
        {
            "sources": [
                # The path is the folder that npm installs into.
                {"kind": "emoji_designs", "path": "data/npm", "split": split, "shard_size": 1000}
                for split in SPLITS
            ],
            "picture_side": 64,
            # Designs of one concept, skin tones and flags are alike on purpose.
            "duplicates": {"exact": False},
        }
    )
