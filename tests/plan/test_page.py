"""Tests the output of a plan, and the message for a program that does not fit."""

import dataclasses

import pytest

from leon_jax.plan import plan_page
from leon_jax.plan.collectives import Collective
from leon_jax.plan.plan import Memory, Plan, Roofline, memory_shortage

GIB = 2**30
FIGURES = {
    "seconds_per_batch": 2.5, "pictures_per_second": 12.8, "tokens_per_second": 13107.2,
}  # fmt: skip


@pytest.fixture
def plan():
    return Plan(
        "decode", "v5e:2x4", 8, 8,
        {"mesh": (1, 1, 1, 8), "rows": 32, "guidance": 3.0, "prompt": 128, "weights": "int8"},
        7_000_000_000,
        Memory(2 * GIB, 0, GIB, 4 * GIB, 16 * GIB, GIB),
        {"all-reduce": Collective(2, 64, 5e9)},
        {"token": Roofline(0.001, 0.002, 0.003)},
        FIGURES, 1.0,
    )  # fmt: skip


def test_every_number_has_its_unit(plan):
    lines = dict(plan_page.lines(plan, "a.py"))
    assert lines["mesh, data x fsdp x context x tensor"] == "1 x 1 x 1 x 8"
    assert lines["images generated at once"] == "32"
    assert lines["tokens of a prompt"] == "128"
    assert lines["all-reduce"] == "5.000 GB sent by a device; 2 instructions, run 64 times"
    seconds = "compute 0.001 s, memory 0.002 s, links 0.003 s; limited by links"
    assert lines["a token takes at least"] == seconds
    assert lines["all images take at least"] == "2.5 s"
    assert lines["images a second at most"] == "12.80"
    html = plan_page.page(plan, "a.py")
    assert "parameters 2.00 GiB<" in html and "capacity 16 GiB<" in html


def test_the_peak_of_an_evaluation_is_a_line(plan):
    figures = {**FIGURES, "evaluation_peak": 3.0 * GIB}
    lines = dict(plan_page.lines(dataclasses.replace(plan, figures=figures), "a.py"))
    assert lines["peak of an evaluation on held-out documents, a device"] == "3.00 GiB"


def test_a_compilers_memory_error_becomes_one_sentence():
    message = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 29.61G of 15.75G hbm. Exceeded hbm capacity by 13.86G.\n\nTotal hbm usage"
    )
    assert memory_shortage(message) == (
        "it needs at least 29.61 GiB of memory, and a device has 15.75 GiB"
    )
    assert memory_shortage("hbm: else") == "it needs more memory than a device has"
