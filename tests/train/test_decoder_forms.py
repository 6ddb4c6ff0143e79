"""Training steps, weight decay and checkpoints of decoders in other forms than CM3Leon's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from leon_jax.config import UserError
from leon_jax.data.config import DataConfig
from leon_jax.models.decoder import Decoder
from leon_jax.models.decoder_config import Form
from leon_jax.train.checkpoint import Checkpoints
from leon_jax.train.decoder import DecoderProgram, check_divisible
from leon_jax.train.decoder_config import DecoderTraining
from leon_jax.train.decoder_loss import batch_loss
from leon_jax.train.optimizer import OptimizerConfig
from leon_jax.vocabulary import Vocabulary
from leon_jax.weight_files import flatten
from tests.models import forms
from tests.tiny import randomise

VOCABULARY = Vocabulary.compact(image_codes=12, text_tokens=26, sentinels=4)
# A decoder that does not predict text is not trained.
NAMES = [name for name in forms.FORMS if name not in ("cm3leon", "image_head")]


def training(name: str, **options) -> DecoderTraining:
    optimizer = OptimizerConfig(1e-2, 100, schedule="constant", weight_decay=0.5)
    return DecoderTraining(
        forms.config(name, vocab_size=VOCABULARY.size, init_std=0.1),
        VOCABULARY,
        optimizer,
        batch_size=4,
        steps=100,
        data=DataConfig(image_shape=(2, 3), length=16),
        **options,
    )


def batch() -> dict[str, np.ndarray]:
    """Two packed documents a row, each a text and an image of 2 x 3 tokens."""
    rng = np.random.default_rng(0)
    rows, v = [], VOCABULARY
    for _ in range(4):
        text, image = v.text_start + rng.integers(0, 26), v.image_start + rng.integers(0, 12, 6)
        rows.append([v.eos, text, v.break_id, *image, v.eos, v.eos, text, v.break_id, *image])
    ids = np.array(rows, np.int32)
    assert ids.shape == (4, 19)
    ids, targets = ids[:, :16], ids[:, 1:17]
    return {
        "ids": ids,
        "targets": targets,
        "segment_ids": np.array([[1] * 10 + [2] * 6] * 4, np.int32),
        "positions": np.array([[*range(10), *range(6)]] * 4, np.int32),
        "weights": np.ones((4, 16), np.float32),
    }


def random_model(program: DecoderProgram) -> Decoder:
    """Returns a program's model with random weights; nothing is compiled."""
    return randomise(jax.eval_shape(program.init, jax.random.key(0)).model)


def test_a_decoder_that_predicts_images_only_is_refused():
    program = DecoderProgram(training("image_head"))
    with pytest.raises(UserError, match="the decoder predicts image codes only"):
        program.init(jax.random.key(0))


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_the_cross_entropy_of_the_logits(name):
    model, inputs = random_model(DecoderProgram(training(name))), batch()
    loss, _ = jax.jit(lambda m: batch_loss(m, inputs, vocabulary=VOCABULARY, chunk=7))(model)
    cells = np.stack([VOCABULARY.cells(row) for row in inputs["ids"]])

    @jax.jit
    def logits(model):
        hidden = model(inputs["ids"], inputs["positions"], inputs["segment_ids"], cells)
        return model.logits(hidden)

    scores = log_softmax(np.asarray(logits(model), np.float64), axis=-1)
    expected = -np.take_along_axis(scores, inputs["targets"][..., None], axis=-1).mean()
    assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_training_learns_a_batch_by_heart_and_changes_every_weight(name):
    program, inputs = DecoderProgram(training(name)), batch()
    first = state = jax.jit(program.init)(jax.random.key(0))
    step, losses = jax.jit(program.step), []
    for _ in range(40):
        state, metrics = step(state, inputs)
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(np.log(VOCABULARY.size), abs=0.7)
    # The first text of a document cannot be known, nor the first code of an image.
    assert losses[-1] < 0.5 * losses[0]
    before = flatten(first.model)
    for key, weight in flatten(state.model).items():
        # A bias of all keys, and the part of a query's bias that meets them, cancel in the softmax.
        assert key.endswith("key_bias") or np.any(weight != before[key]), key


def test_microbatches_give_the_same_update_of_every_form():
    for name in ("llama", "grid"):
        whole, parts = (DecoderProgram(training(name, microbatches=count)) for count in (1, 2))
        state = jax.jit(whole.init)(jax.random.key(0))
        expected, updated = (
            flatten(jax.jit(program.step)(state, batch())[0].opt_state)
            for program in (whole, parts)
        )
        for key, array in expected.items():
            atol = 1e-5 * np.abs(array).max()
            np.testing.assert_allclose(updated[key], array, rtol=1e-4, atol=atol, err_msg=key)


@pytest.mark.parametrize("name", ["opt", "chameleon"])
def test_weight_decay_spares_scales_and_biases(name):
    """With a gradient of zero, Adam moves nothing, so an update is the decay alone."""
    program = DecoderProgram(training(name))
    model = random_model(program)

    @jax.jit
    def update(model):
        zeros = jax.tree.map(jnp.zeros_like, model)
        return program.optimizer.update(zeros, program.optimizer.init(model), model)[0]

    updates = update(model)
    weights, count = flatten(model), 0
    for key, update in flatten(updates).items():
        if key.endswith(("_scale", "_bias")):
            assert not np.any(update), key
            count += 1
        else:
            np.testing.assert_allclose(update, -1e-2 * 0.5 * weights[key], rtol=1e-5)
    assert count > 5


def test_a_checkpoint_restores_every_form(tmp_path):
    for name in ("opt", "chameleon_post", "llamagen"):
        program = DecoderProgram(training(name))
        state = jax.jit(program.init)(jax.random.key(0))
        state = dataclasses.replace(state, model=randomise(state.model))
        checkpoints = Checkpoints(tmp_path / name)
        checkpoints.save(state, {"0": "{}"})
        checkpoints.close()
        abstract = jax.eval_shape(program.init, jax.random.key(0))
        _, restored, _ = Checkpoints(tmp_path / name).restore(abstract)
        expected = flatten(state.model)
        for key, array in flatten(restored.model).items():
            np.testing.assert_array_equal(array, expected[key])


def test_columns_of_the_grid_are_those_of_the_images():
    config = training("grid")
    with pytest.raises(UserError, match=r"model\.form\.image_columns is 3; .* 4"):
        dataclasses.replace(config, data=DataConfig(image_shape=(2, 4), length=16))
    with pytest.raises(UserError, match=r"is .stream., which cuts images"):
        stream = DataConfig(image_shape=(2, 3), length=16, packing="stream")
        dataclasses.replace(config, data=stream)
    plain = dataclasses.replace(config.model, form=Form())
    dataclasses.replace(config, model=plain, data=DataConfig(image_shape=(2, 4), length=16))


def test_heads_of_keys_are_split_evenly():
    config = training("llama")
    check_divisible(config, (1, 1, 1, 2))
    with pytest.raises(UserError, match=r"config\.model\.kv_heads is 2; .*multiple of tensor, 4"):
        check_divisible(config, (1, 1, 1, 4))
