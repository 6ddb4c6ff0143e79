"""The shipped text tokenizer: byte-level BPE trained on the captions of five designs.

    leon train --config=configs/emoji/text.py --workdir=runs/emoji/text

Reads the documents of configs/emoji/designs.py.
"""

from ml_collections import ConfigDict

# Sentences of tasks that the model will be tuned on, so that the text tokenizer knows their words.
INSTRUCTIONS = (
    "what is left of the red apple?",
    "what is right of the cat?",
    "what is above the house?",
    "what is below the tree?",
    "how many cats are there?",
    "is there a dog? yes",
    "is there a dog? no",
    "what colour is the car?",
    "describe the image",
    "where is the cat? cat: 10 20 60 80",
    "replace the apple with a pear",
    "remove the apple",
    "add a cat on the left",
    "draw the outline of the cat",
    "make it Twemoji style",
    "make it OpenMoji style",
)


def get_config() -> ConfigDict:
    """Returns the configuration of `leon_jax.train.text_tokenizer`."""
    return ConfigDict({**stage(), "data": {"folder": "data/emoji_designs"}})


def stage() -> dict:
    """Returns the configuration without the data, which the pipeline sets."""
    return {
        "kind": "text",
        "size": 4096,
        "split_digits": True,
        # Often enough that their words become tokens.
        "texts": INSTRUCTIONS * 20,
    }
