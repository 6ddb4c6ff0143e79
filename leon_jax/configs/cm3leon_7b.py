"""CM3Leon-7B (arXiv 2309.02591, Table 3): 6,728 million parameters.

    leon train --config=configs/cm3leon_7b.py --workdir=runs/cm3leon_7b

The paper trained it on 512 A100s. configs/cm3leon_base.py gives the source of each number.
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the configuration of `leon_jax.train.decoder.DecoderProgram`."""
    # Config files are loaded by path, so `configs` may not be importable as a package.
    base = runpy.run_path(str(pathlib.Path(__file__).with_name("cm3leon_base.py")))
    return base["make"](layers=32, embed=4096, heads=32, learning_rate=1.2e-4, tokens=2.4e12)
