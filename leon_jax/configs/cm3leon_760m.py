"""CM3Leon-760M (arXiv 2309.02591, Table 3): 786 million parameters.

    leon train --config=configs/cm3leon_760m.py --workdir=runs/cm3leon_760m

The paper trained it on 256 A100s. configs/cm3leon_base.py gives the source of each number.
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the configuration of `leon_jax.train.decoder.DecoderProgram`."""
    # Config files are loaded by path, so `configs` may not be importable as a package.
    base = runpy.run_path(str(pathlib.Path(__file__).with_name("cm3leon_base.py")))
    return base["make"](layers=24, embed=1536, heads=16, learning_rate=5e-4, tokens=1.9e12)
