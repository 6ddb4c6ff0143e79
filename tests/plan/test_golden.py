"""The large models' programs, as the compiler for TPUs makes them, stay what they are."""

import json

import pytest

from tests.plan import golden


@pytest.mark.slow
@pytest.mark.parametrize("name", golden.PLANS)
def test_collectives_and_memory_are_as_recorded(name):
    expected = json.loads(golden.GOLDEN.read_text())[name]
    found = golden.summary(golden.plan(*golden.PLANS[name]))
    again = "if that is meant: python -m tests.plan.golden"
    assert found["collectives"] == expected["collectives"], again
    assert found["peak_gib"] == pytest.approx(expected["peak_gib"], rel=0.02), again
    assert found["sent_gb"] == pytest.approx(expected["sent_gb"], rel=0.02), again
