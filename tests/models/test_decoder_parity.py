"""The decoder equals the OPT of transformers, in logits and gradients.

The form of CM3Leon equals an OPT without biases and affine norms.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from leon_jax.models.decoder import Decoder
from leon_jax.models.decoder_config import DecoderConfig, Form
from tests import peers
from tests.models.opt_weights import to_opt

OPT = Form(norm_scale=True, norm_bias=True, qkv_bias=True, out_bias=True, mlp_bias=True)
CONFIG = DecoderConfig(vocab_size=96, max_length=24, layers=3, embed=32, heads=4, mlp=128)


def random_decoder(form: Form) -> Decoder:
    """Returns a decoder with random weights, because its initial layers are the identity."""
    rng = np.random.default_rng(0)
    model = Decoder(dataclasses.replace(CONFIG, form=form), rngs=nnx.Rngs(0))
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32, device=leaf.sharding),
        model,
    )


def next_token_loss(model: Decoder, ids: jax.Array) -> jax.Array:
    """Returns the mean of -log p(next token) over all positions except the last."""
    scores = jax.nn.log_softmax(model.logits(model(ids))[:, :-1])
    return -(scores * jax.nn.one_hot(ids[:, 1:], scores.shape[-1])).sum(axis=-1).mean()


@pytest.mark.peers
@pytest.mark.parametrize("form", [Form(), OPT])
def test_decoder_equals_opt(form):
    """Same weights, same ids: logits within 1e-4 and gradients within 1e-5, in float32."""
    model = random_decoder(form)
    # Ids start at 2, because OPT treats id 1, its padding, differently.
    ids = np.random.default_rng(1).integers(2, CONFIG.vocab_size, (2, CONFIG.max_length))
    expected = peers.run_peer(
        Path(__file__).with_name("opt_in_torch.py"),
        {**to_opt(model), "ids": ids, "heads": np.array(CONFIG.heads)},
    )
    logits = jax.jit(lambda model, ids: model.logits(model(ids)))(model, jnp.asarray(ids))
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4, rtol=0)
    # The comparison is only meaningful if the logits are not all near zero.
    assert np.std(expected["logits"]) > 0.3

    gradients = to_opt(jax.jit(jax.grad(next_token_loss))(model, jnp.asarray(ids)))
    assert {f"gradient.{name}" for name in gradients} == set(expected) - {"logits"}
    for name, gradient in gradients.items():
        np.testing.assert_allclose(
            gradient, expected[f"gradient.{name}"], atol=1e-5, rtol=1e-4, err_msg=name
        )
