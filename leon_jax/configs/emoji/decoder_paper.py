"""A decoder of the size of the shipped one, in the form of the paper, which is that of OPT.

    leon train --config=configs/emoji/decoder_paper.py --workdir=runs/emoji/decoder_paper

Layer norms, an MLP with ReLU, learned positions without gaps, and the embedding table as the output
head. So the weights fit OPT of other libraries. 8.5 million parameters.
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the configuration of `leon_jax.train.decoder.DecoderProgram`."""
    shipped = runpy.run_path(str(pathlib.Path(__file__).with_name("decoder.py")))
    config = shipped["get_config"]()
    # The default form is the paper's.
    del config.model.form
    config.model.mlp = 4 * config.model.embed
    # With sinusoids a shift by a row or column is a rotation from the first step on.
    config.model.position_init = "sinusoids"
    config.model.position_std = 0.02
    return config
