"""The shipped model from the emoji packages: the text tokenizer to the second decoder stage.

    leon pipeline --config=configs/emoji/pipeline.py --workdir=runs/emoji

Takes two and a half hours on two CPU cores. `make weights` runs it and replaces the shipped model.
"""

import json
import pathlib
import runpy

from ml_collections import ConfigDict

HERE = pathlib.Path(__file__).parent
SPLITS = ("train", "unseen_design", "unseen_concept")


def get_config() -> ConfigDict:
    """Returns the configuration of `leon_jax.pipeline`."""
    stages = {
        name: runpy.run_path(str(HERE / f"{name}.py"))["get_config"]().to_dict()
        for name in ("text", "tokenizer", "encoder", "decoder", "decoder_second")
    }
    return ConfigDict(
        {
            "kind": "pipeline",
            "prepare": {
                # A missing dataset is rendered first.
                "sources": [
                    {"kind": "emoji", "path": "data/emoji", "split": split, "shard_size": 1000}
                    for split in SPLITS
                ],
                "picture_side": 96,
                # Designs of one concept, skin tones and flags are alike on purpose.
                "duplicates": {"exact": False},
            },
            "encode": {"variants": 48},
            # docs/retrieval.md explains these thresholds.
            "selection": json.loads((HERE / "selection.json").read_text()),
            "stages": stages,
            "seconds": {"tokenizer": 900, "encoder": 1500, "decoder": 5400, "decoder_second": 900},
        }
    )
