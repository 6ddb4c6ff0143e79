"""Decoders in other forms equal models of transformers, in logits and gradients."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from leon_jax.ops.attention import attention
from leon_jax.ops.rotary import rotation
from tests import peers
from tests.models import forms
from tests.models.llama_weights import to_llama
from tests.models.test_decoder_parity import next_token_loss


@pytest.mark.peers
@pytest.mark.parametrize("name", ["llama", "llama_biases", "qwen3", "chameleon", "chameleon_post"])
def test_a_form_equals_its_model_in_transformers(name):
    """Same weights, same ids: one layer, the logits, and all gradients, in float32."""
    model = forms.decoder(name, scale=0.2, max_length=24)
    config, form = model.config, model.config.form
    ids = np.random.default_rng(1).integers(0, config.vocab_size - 1, (2, config.max_length))
    options = {
        "heads": config.heads,
        "kv_heads": config.key_heads,
        "base": form.rotary_base,
        "epsilon": form.norm_epsilon,
        "post": form.norm_place == "post",
    }
    expected = peers.run_peer(
        Path(__file__).with_name("llama_in_torch.py"),
        {
            **to_llama(model),
            **{f"option.{key}": np.array(value, np.float64) for key, value in options.items()},
            "ids": ids,
        },
    )
    layer = jax.tree.map(lambda x: x[0], model.blocks)
    by = rotation(
        jnp.arange(config.max_length)[None], head_dim=config.head_dim, base=form.rotary_base
    )
    first, _ = layer(jnp.asarray(np.asarray(model.table[...])[ids]), attention, by)
    np.testing.assert_allclose(first, expected["layer"], atol=1e-4, rtol=1e-5)

    ids = jnp.asarray(ids)
    logits = jax.jit(lambda model, ids: model.logits(model(ids)))(model, ids)
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4, rtol=0)
    # The comparison is only meaningful if the logits are not all near zero.
    assert np.std(expected["logits"]) > 0.1

    gradients = to_llama(jax.jit(jax.grad(next_token_loss))(model, ids))
    assert {f"gradient.{name}" for name in gradients} == set(expected) - {"logits", "layer"}
    for key, gradient in gradients.items():
        wanted = expected[f"gradient.{key}"]
        np.testing.assert_allclose(
            gradient, wanted, atol=1e-5 * max(1, np.abs(wanted).max()), rtol=1e-3, err_msg=key
        )
