"""Tests that `leon plan` traces the evaluation of each kind of model as a run does."""

import jax
import pytest

from leon_jax import sharding
from leon_jax.plan.kinds import TracedStep
from leon_jax.train.evaluation import rows_of_batch
from tests.plan import test_products, test_search

KINDS = {"decoder": lambda: test_search.DECODER, **test_products.KINDS}
OUTPUTS = {
    "decoder": {"image_loss", "text_loss"},
    "tokenizer": {"l1", "lpips", "psnr_db", "codes"},
    "encoder": {"image", "text"},
}


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])):
        yield


@pytest.mark.parametrize("name", KINDS)
def test_an_evaluation_has_outputs_for_each_row_of_its_batch(name):
    program = KINDS[name]().program
    traced = TracedStep.of(program).evaluation(program, largest=6, count=10)
    outputs = traced.out_info
    assert outputs.keys() == OUTPUTS[name]
    assert {output.shape[0] for output in outputs.values()} == {6}


def test_a_batch_has_no_more_rows_than_there_are():
    assert rows_of_batch(6, 10) == 6
    assert rows_of_batch(6, 4) == 4
