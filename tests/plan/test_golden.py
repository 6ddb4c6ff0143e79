"""Tests that the compiled programs of the large models do not change unintentionally."""

import json

import pytest

from tests.plan import golden


@pytest.mark.slow
@pytest.mark.parametrize("name", golden.PLANS)
def test_collectives_and_memory_are_as_recorded(name):
    expected = json.loads(golden.GOLDEN.read_text())[name]
    summary = golden.summary(golden.plan(*golden.PLANS[name]))
    hint = "after an intended change, run python -m tests.plan.golden"
    assert summary["collectives"] == expected["collectives"], hint
    assert summary["peak_gib"] == pytest.approx(expected["peak_gib"], rel=0.02), hint
    assert summary["sent_gb"] == pytest.approx(expected["sent_gb"], rel=0.02), hint
