"""Tests the attempts of `leon plan --search` and their order; nothing is compiled."""

import dataclasses
import types

import pytest

from leon_jax.data.config import DataConfig
from leon_jax.models.decoder_config import DecoderConfig
from leon_jax.plan import search, train
from leon_jax.plan.kinds import DecoderKind, EncoderKind, Setting, TokenizerKind
from leon_jax.plan.plan import DoesNotFit, Roofline
from leon_jax.train.decoder_config import DecoderTraining
from leon_jax.train.optimizer import OptimizerConfig
from leon_jax.vocabulary import Vocabulary
from tests.train import test_image_tokenizer, test_retrieval_encoder

VOCABULARY = Vocabulary.compact(64, 1024, 66)
CONFIG = DecoderTraining(
    model=DecoderConfig(VOCABULARY.size, 1024, layers=2, embed=512, heads=8, mlp=1024),
    vocabulary=VOCABULARY,
    optimizer=OptimizerConfig(1e-3, 100),
    batch_size=512,
    steps=1,
    data=DataConfig(length=1024),
)
DECODER = DecoderKind(CONFIG)
REMAT = DecoderKind.remat
POD = types.SimpleNamespace(devices=(None,) * 16)
MESH = (1, 16, 1, 1)


def run_search(monkeypatch, setting, fits, seconds=lambda setting: 1.0, kind=DECODER):
    """Searches with `fits` and `seconds` in place of the compiler.

    Returns the chosen setting, or None, and all settings that were tried.
    """
    tried = []

    def plan(kind, topology, other):
        kind.check(other)
        tried.append(other)
        if not fits(other):
            raise DoesNotFit("too large")
        bound = Roofline(seconds(other), 0.0, 0.0)
        return types.SimpleNamespace(rooflines={"step": bound}, setting=dataclasses.asdict(other))

    monkeypatch.setattr(train, "plan", plan)
    result = search.search(kind, POD, setting, lambda line: None)
    return result and Setting(**result.setting), tried


def test_the_smallest_change_keeps_the_mesh_and_recomputes_least(monkeypatch):
    start = Setting(MESH, "none", 1)
    chosen, tried = run_search(monkeypatch, start, lambda s: s.microbatches >= 4)
    assert chosen == Setting(MESH, "none", 4)
    assert tried[:4] == [start, *(Setting(MESH, "none", count) for count in (2, 4))][:4]


def test_the_remat_policy_changes_if_there_are_many_microbatches_already(monkeypatch):
    chosen, _ = run_search(monkeypatch, Setting(MESH, "none", 16), lambda s: s.remat == "full")
    assert chosen == Setting(MESH, "full", 16)


def test_two_keys_change_if_one_is_not_enough(monkeypatch):
    chosen, _ = run_search(
        monkeypatch, Setting(MESH, "none", 1), lambda s: s.remat == "full" and s.microbatches > 1
    )
    assert chosen == Setting(MESH, "full", 2)


def test_a_search_without_a_fitting_setting_returns_none(monkeypatch):
    chosen, tried = run_search(monkeypatch, Setting(MESH, "none", 1), lambda s: False)
    assert chosen is None and len(tried) == 33


def test_the_mesh_changes_if_nothing_else_is_enough(monkeypatch):
    start = Setting(MESH, "none", 1)
    chosen, tried = run_search(monkeypatch, start, lambda s: s.mesh[3] == 2)
    assert chosen == Setting((1, 8, 1, 2), "none", 1)
    assert all(other.mesh == MESH for other in tried[:16]), "policies and microbatches come first"


@pytest.mark.parametrize("remat", REMAT)
def test_the_fastest_setting_does_not_depend_on_the_start(monkeypatch, remat):
    """Less recomputation and fewer microbatches are faster; `none` needs four of them."""

    def fits(setting):
        return setting.remat != "none" or setting.microbatches >= 4

    def seconds(setting):
        fast = setting.mesh == (1, 16, 1, 1)
        return REMAT.index(setting.remat) + setting.microbatches / 100 + (0 if fast else 0.001)

    start = Setting((4, 4, 1, 1), remat, 8)
    chosen, _ = run_search(monkeypatch, start, fits, seconds)
    assert chosen == Setting((1, 16, 1, 1), "none", 4)


def test_a_tokenizer_recomputes_its_layers_or_does_not_fit(monkeypatch):
    """No mesh saves memory, because only the batch is split."""
    config = dataclasses.replace(test_image_tokenizer.CONFIG, batch_size=16)
    kind = TokenizerKind(config)
    start = kind.setting((16, 1, 1, 1))
    assert start == Setting((16, 1, 1, 1), False)
    recomputing = dataclasses.replace(start, remat=True)
    chosen, tried = run_search(monkeypatch, start, lambda s: s.remat, kind=kind)
    assert chosen == recomputing and chosen.changes(start) == "--config.model.remat=True"
    assert tried == [start, recomputing]
    chosen, tried = run_search(monkeypatch, start, lambda s: False, kind=kind)
    assert chosen is None and tried == [start, recomputing]
    # If it fits without, it is not recomputed.
    chosen, _ = run_search(
        monkeypatch, recomputing, lambda s: True, lambda s: 1.0 + s.remat, kind=kind
    )
    assert chosen == start


def test_an_encoder_is_split_over_fsdp_and_tensor_but_not_over_the_context(monkeypatch):
    config = test_retrieval_encoder.tiny("", "no text tokenizer is read")
    text = dataclasses.replace(config.model.text, vocab_size=304)
    model = dataclasses.replace(config.model, text=text)
    kind = EncoderKind(dataclasses.replace(config, model=model, batch_size=32))
    start = kind.setting((16, 1, 1, 1))
    chosen, tried = run_search(monkeypatch, start, lambda s: s.mesh[1] == 16 and s.remat, kind=kind)
    assert chosen == Setting((1, 16, 1, 1), True)
    _, tried = run_search(monkeypatch, start, lambda s: False, kind=kind)
    assert {other.mesh[2] for other in tried} == {1}
    # Two heads cannot be split over more than two devices.
    assert {other.mesh[3] for other in tried} == {1, 2}
    assert {other.microbatches for other in tried} == {1}
