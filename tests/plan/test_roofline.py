"""Tests counted work against XLA's cost analysis of one layer, which has no loop."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from leon_jax.models.decoder import Decoder
from leon_jax.models.decoder_config import DecoderConfig, Form
from leon_jax.ops.attention import CachedArray, LayerCache
from leon_jax.plan import roofline
from leon_jax.plan.roofline import training_flops, training_work
from leon_jax.train.decoder_loss import batch_loss
from leon_jax.vocabulary import Vocabulary

VOCABULARY = Vocabulary.compact(64, 300, 4)
# Wide enough that attention scores, which XLA does not skip above the diagonal, hardly count.
CONFIG = DecoderConfig(VOCABULARY.size, 8, layers=1, embed=256, heads=4, mlp=1024)


LLAMA = Form(norm="rms", norm_scale=True, mlp="swiglu", positions="rotary", tied_head=False)
GROUPED = dataclasses.replace(CONFIG, kv_heads=2, form=LLAMA)


REMAT = ("none", "dots_and_attention", "dots", "attention", "full")


@pytest.mark.parametrize("remat", REMAT)
@pytest.mark.parametrize("config", [CONFIG, GROUPED], ids=["cm3leon", "llama"])
def test_training_operations_agree_with_xlas_count(remat, config):
    config = dataclasses.replace(config, remat=remat)
    model = Decoder(config, rngs=nnx.Rngs(0))
    batch = {
        name: jnp.ones((4, 8), dtype)
        for name, dtype in [
            ("ids", jnp.int32),
            ("targets", jnp.int32),
            ("segment_ids", jnp.int32),
            ("positions", jnp.int32),
            ("weights", jnp.float32),
        ]
    }

    def loss(model):
        return batch_loss(model, batch, vocabulary=VOCABULARY, chunk=32)[0]

    xla_flops = jax.jit(jax.grad(loss)).lower(model).compile().cost_analysis()["flops"]
    assert training_flops(config, 8) * 32 == pytest.approx(xla_flops, rel=0.04)


def test_executed_operations_are_more_than_the_models():
    for remat in REMAT:
        config = dataclasses.replace(CONFIG, max_length=4096, remat=remat)
        assert training_flops(config, 4096) > config.flops_per_token(4096)


def test_recomputation_costs_at_most_about_one_forward_pass():
    flops = {
        remat: training_flops(dataclasses.replace(CONFIG, max_length=4096, remat=remat), 4096)
        for remat in REMAT
    }
    forward = CONFIG.flops_per_token(4096) / 3
    assert flops["none"] == flops["dots_and_attention"]
    assert flops["none"] < flops["dots"] < flops["full"] < flops["none"] + 1.3 * forward
    assert flops["none"] < flops["attention"] < flops["full"]


def test_tensor_parallel_devices_share_the_work():
    whole = training_work(CONFIG, 8, 1000, 0.0, fsdp=1, tensor=1)
    part = training_work(CONFIG, 8, 1000, 0.0, fsdp=1, tensor=4)
    assert part.flops == whole.flops / 4 and part.hbm_bytes == whole.hbm_bytes / 4


@pytest.mark.parametrize("config", [CONFIG, GROUPED], ids=["cm3leon", "llama"])
def test_decode_work_equals_the_arrays_and_operations_of_a_decode_step(config):
    config = dataclasses.replace(config, max_length=128)
    model = Decoder(config, rngs=nnx.Rngs(0))
    slots, rows, ids = 100, 2, VOCABULARY.image_codes
    # Scales of norms are not counted.
    blocks = [leaf for leaf in jax.tree.leaves(model.blocks) if leaf.ndim > 2]
    head = model.head(VOCABULARY.image_start, VOCABULARY.image_start + ids)
    width = config.key_heads * config.head_dim
    cache = np.zeros((2, config.layers, rows, slots, width), np.float32)
    work = roofline.decode_work(config, slots, ids, rows, tensor=1)
    assert work.hbm_bytes == sum(leaf.nbytes for leaf in blocks) + head.nbytes + cache.nbytes
    keys = jnp.asarray(cache[0]).reshape(config.layers, rows, config.key_heads, slots, -1)
    inputs, mask = np.zeros((1, rows, 1), np.int32), np.ones((rows, slots), bool)

    def token(model, keys):
        # Half of the slots belong to prompts, half to completions.
        first, last = keys[..., : slots // 2, :], keys[:, :, None, :, slots // 2 :]
        prompt = LayerCache([CachedArray(first)], [CachedArray(first)], mask[:, : slots // 2])
        completion = LayerCache(
            [CachedArray(last)], [CachedArray(last)], mask[:, None, slots // 2 :]
        )
        hidden, *_ = model.decode_step(inputs, inputs, [prompt], [completion])
        return model.logits(hidden, head)

    xla_flops = jax.jit(token).lower(model, keys).compile().cost_analysis()["flops"]
    assert work.flops == pytest.approx(xla_flops, rel=0.06)
