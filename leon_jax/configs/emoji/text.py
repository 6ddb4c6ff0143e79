"""The shipped text tokenizer: byte-level BPE trained on the training captions.

leon train --config=configs/emoji/text.py --workdir=runs/emoji/text
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict({"kind": "text", "size": 2048, "data": {"folder": "data/emoji_prepared"}})
