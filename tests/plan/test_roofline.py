"""Counted work equals XLA's own count where that is right: one layer, no loop to miscount."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from leon_jax.models.decoder import Decoder, DecoderConfig
from leon_jax.ops.attention import CachedArray, LayerCache
from leon_jax.plan import roofline
from leon_jax.plan.roofline import training_flops, training_work
from leon_jax.train.decoder_loss import batch_loss
from leon_jax.vocabulary import Vocabulary

VOCABULARY = Vocabulary.compact(64, 300, 4)
# So wide that scores, which XLA computes whole and flash attention half, hardly count.
CONFIG = DecoderConfig(VOCABULARY.size, 8, layers=1, embed=256, heads=4, mlp=1024)


@pytest.mark.parametrize("remat", ["none", "dots", "attention", "full"])
def test_operations_are_those_that_xla_counts(remat):
    config = dataclasses.replace(CONFIG, remat=remat)
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

    counted = jax.jit(jax.grad(loss)).lower(model).compile().cost_analysis()["flops"]
    assert training_flops(config, 8) * 32 == pytest.approx(counted, rel=0.04)


def test_executed_operations_are_at_least_those_needed():
    for remat in ("none", "dots", "attention", "full"):
        config = dataclasses.replace(CONFIG, max_length=4096, remat=remat)
        assert training_flops(config, 4096) > config.flops_per_token(4096)


def test_recomputation_costs_a_forward_pass_at_most():
    flops = {
        remat: training_flops(dataclasses.replace(CONFIG, max_length=4096, remat=remat), 4096)
        for remat in ("none", "dots", "attention", "full")
    }
    forward = CONFIG.flops_per_token(4096) / 3
    assert flops["none"] < flops["dots"] < flops["full"] < flops["none"] + 1.3 * forward
    assert flops["none"] < flops["attention"] < flops["full"]


def test_tensor_parallel_devices_share_the_work():
    alone = training_work(CONFIG, 8, 1000, 0.0, fsdp=1, tensor=1)
    shared = training_work(CONFIG, 8, 1000, 0.0, fsdp=1, tensor=4)
    assert shared.flops == alone.flops / 4 and shared.hbm_bytes == alone.hbm_bytes / 4


def test_a_decoded_token_reads_what_the_loop_holds():
    """Compiled: the arrays that the loop of the real program reads in every iteration."""
    config = dataclasses.replace(CONFIG, max_length=128)
    model = Decoder(config, rngs=nnx.Rngs(0))
    slots, rows, ids = 100, 2, VOCABULARY.image_codes
    blocks = jax.tree.leaves(model.blocks)
    head = model.head(VOCABULARY.image_start, VOCABULARY.image_start + ids)
    cache = np.zeros((2, config.layers, rows, slots, config.embed), np.float32)
    work = roofline.decode_work(config, slots, ids, rows, tensor=1)
    assert work.hbm_bytes == sum(leaf.nbytes for leaf in blocks) + head.nbytes + cache.nbytes
    keys = jnp.asarray(cache[0]).reshape(config.layers, rows, config.heads, slots, -1)
    inputs, seen = np.zeros((1, rows, 1), np.int32), np.ones((rows, slots), bool)

    def token(model, keys):
        # Half of the slots are of prompts, half of answers.
        first, last = keys[..., : slots // 2, :], keys[:, :, None, :, slots // 2 :]
        prompt = LayerCache([CachedArray(first)], [CachedArray(first)], seen[:, : slots // 2])
        answer = LayerCache([CachedArray(last)], [CachedArray(last)], seen[:, None, slots // 2 :])
        hidden, *_ = model.decode_step(inputs, inputs, [prompt], [answer])
        return model.logits(hidden, head)

    counted = jax.jit(token).lower(model, keys).compile().cost_analysis()["flops"]
    assert work.flops == pytest.approx(counted, rel=0.06)
