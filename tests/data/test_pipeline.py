"""The input pipeline: epochs, mixtures, shards, exact resumption, and the end of the process."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import grain
import numpy as np
import pytest

from leon_jax.config import UserError
from leon_jax.data import pipeline
from leon_jax.data.config import DataConfig
from leon_jax.data.masking import MaskingConfig, unmask
from tests.data.little import (
    CONFIG,
    DOCUMENTS,
    NEVER,
    component,
    make,
    make_documents,
    make_tokenizer,
    take,
    unpack,
)  # fmt: skip

SINGLE = DataConfig(length=80, packing_bins=1, threads=0)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_an_epoch_holds_every_document_once_and_epochs_differ(tokenizer):
    names = {tokenizer.encode(d).tobytes(): i for i, d in enumerate(DOCUMENTS)}
    order = []
    for batch in take(iter(make(tokenizer, SINGLE, batch_size=1, retrieved=(1.0,))), 30):
        for ids, _ in unpack(batch, tokenizer.vocabulary.eos):
            order.append(names[unmask(ids, tokenizer.vocabulary).tobytes()])
    count = len(DOCUMENTS)
    # Packing may swap examples across the end of an epoch.
    assert set(order[:count]) | set(order[count : count + 4]) == set(range(count))
    assert order[:10] != order[count : count + 10]


def test_masks_differ_between_epochs(tokenizer):
    seen = {}
    batches = make(tokenizer, SINGLE, MaskingConfig(spans="fim"), batch_size=1, retrieved=(1.0,))
    for batch in take(iter(batches), 60):
        for ids, _ in unpack(batch, tokenizer.vocabulary.eos):
            seen.setdefault(unmask(ids, tokenizer.vocabulary).tobytes(), set()).add(ids.tobytes())
    assert np.mean([len(instances) > 1 for instances in seen.values()]) > 0.9


# Captions of the second component begin with numbers from 100 on.
MIXTURE = (
    component(weight=3.0),
    component(make_documents(7, first=100), weight=1.5, retrieved=(1.0,)),
)


def query_numbers(tokenizer, components, count, shard=(0, 1), config=SINGLE):
    """The numbers at the beginning of the queries' captions, for the first `count` examples."""
    examples = pipeline.examples(components, tokenizer, config, NEVER, shard=shard)
    numbers = []
    for index in range(count):
        example = examples[index]
        ids = np.append(example["ids"], example["targets"][-1])
        *_, caption, _ = tokenizer.decode(ids).parts
        numbers.append(int(caption.text.split()[0]))
    return np.array(numbers)


@pytest.mark.parametrize("weights", [(3.0, 1.5), (0.3, 0.2, 0.5), (1, 1000)])
@pytest.mark.parametrize("shard", [(0, 1), (1, 2)])
def test_consecutive_examples_of_a_mixture_have_the_share_of_every_component(
    tokenizer, weights, shard
):
    components = [
        component(make_documents(5, first=100 * i), weight=weight, retrieved=(1.0,))
        for i, weight in enumerate(weights)
    ]
    indices = query_numbers(tokenizer, components, 300, shard) // 100
    share = np.array(weights) / sum(weights)
    seen = np.cumsum(indices[:, None] == np.arange(len(weights)), axis=0)
    assert np.abs(seen - share * np.arange(1, 301)[:, None]).max() < 2


def test_each_component_of_a_mixture_has_separate_epochs_and_random_numbers(tokenizer):
    numbers = query_numbers(tokenizer, MIXTURE, 3 * 23)
    first, second = numbers[numbers < 100], numbers[numbers >= 100]
    assert len(first) == 46 and len(second) == 23
    for epoch in first.reshape(2, 23):
        assert set(epoch) == set(range(23))
    for epoch in second[:21].reshape(3, 7):
        assert set(epoch) == set(range(100, 107))
    # Other components change when the examples of a component appear, but not the examples.
    np.testing.assert_array_equal(first, query_numbers(tokenizer, MIXTURE[:1], 46))
    twins = (
        component(retrieved=(1.0,)),
        component(make_documents(23, first=100), retrieved=(1.0,)),
    )
    numbers = query_numbers(tokenizer, twins, 46)
    assert (numbers[numbers < 100] != numbers[numbers >= 100] - 100).any(), (
        "components of the same size have the same order"
    )


@pytest.mark.parametrize("weighting", [None, np.arange(23.0)])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0)])
def test_shards_divide_the_examples_of_one_order(tokenizer, weights, weighting):
    """This also holds where the pattern of the mixture has the period of the shards."""
    components = [
        component(weight=weights[0], query_weights=weighting),
        component(make_documents(8, first=100), weight=weights[1], retrieved=(1.0,)),
    ]
    whole = query_numbers(tokenizer, components, 96)
    shards = [query_numbers(tokenizer, components, 48, (index, 2)) for index in range(2)]
    for mask in (whole < 100, whole >= 100):
        expected = whole[mask]
        halves = [shard[(shard < 100) == (expected[0] < 100)] for shard in shards]
        for index, half in enumerate(halves):
            np.testing.assert_array_equal(half, expected[index::2])
    first, second = (shard[shard < 100] for shard in shards)
    assert (first != second).any(), "shards sample different examples, also with replacement"


def test_two_processes_read_disjoint_documents(tokenizer):
    halves = []
    for shard in range(2):
        seen = []
        iterator = iter(make(tokenizer, SINGLE, batch_size=1, retrieved=(1.0,), shard=(shard, 2)))
        while len(seen) < len(DOCUMENTS) // 2:
            for ids, _ in unpack(next(iterator), tokenizer.vocabulary.eos):
                seen.append(unmask(ids, tokenizer.vocabulary).tobytes())
        halves.append(set(seen[: len(DOCUMENTS) // 2 - 3]))
    assert not halves[0] & halves[1]


# Three batches are more than an epoch of the larger component.
RESUMED = DataConfig(length=80, packing_bins=3)


@pytest.mark.parametrize("packing", ["whole", "stream"])
@pytest.mark.parametrize("components", [MIXTURE[:1], MIXTURE], ids=["alone", "mixture"])
@pytest.mark.parametrize("saving", [0, 1, 4])
def test_any_number_of_threads_resumes_exactly_from_every_batch(
    tokenizer, saving, components, packing
):
    def start(threads):
        config = dataclasses.replace(RESUMED, packing=packing, threads=threads)
        return iter(make(tokenizer, config, components=components, batch_size=3))

    iterator, states, batches = start(saving), [], []
    for _ in range(8):
        states.append(json.dumps(iterator.get_state()))
        batches.append(next(iterator))
    for number, state in enumerate(states):
        resumed = start((0, 1, 4)[number % 3])
        resumed.set_state(json.loads(state))
        for expected in batches[number:]:
            batch = next(resumed)
            for name in expected:
                np.testing.assert_array_equal(batch[name], expected[name])


@pytest.mark.parametrize("packing", ["whole", "stream"])
def test_checkpoints_are_exact_by_the_check_of_grain(tokenizer, packing):
    config = dataclasses.replace(CONFIG, packing=packing)
    first = grain.experimental.LimitIterDataset(make(tokenizer, config, components=MIXTURE), 6)
    grain.experimental.assert_equal_output_after_checkpoint(first)


def test_invalid_settings_raise_an_error(tokenizer):
    with pytest.raises(UserError, match="packing_bins is 0"):
        dataclasses.replace(CONFIG, packing_bins=0)
    with pytest.raises(UserError, match="threads is -1; it must be at least 0"):
        dataclasses.replace(CONFIG, threads=-1)
    with pytest.raises(UserError, match="batch_size is 0; it must be at least 1"):
        make(tokenizer, batch_size=0)
    with pytest.raises(UserError, match="part_step is 0; it must be at least 1"):
        make(tokenizer, part_step=0)
    with pytest.raises(UserError, match="shard"):
        make(tokenizer, shard=(2, 2))


PROGRAM = """
import dataclasses
from tests.data import little as t

class Source(list):
    def __getitem__(self, index):
        if {where!r} == "thread" and index == 5:
            raise RuntimeError("on purpose")
        return super().__getitem__(index)

config = dataclasses.replace(t.CONFIG, packing={packing!r}, threads=4)
components = [
    t.component(Source(t.DOCUMENTS), folder="first"),
    t.component(t.make_documents(30, 100), weight=2.0),
]
iterator = iter(t.make(t.make_tokenizer(), config, components=components))
for _ in range(30 if {where!r} == "thread" else 1):
    next(iterator)
if {where!r} == "loop":
    raise RuntimeError("on purpose")
print("done")
"""


@pytest.mark.parametrize("packing", ["whole", "stream"])
@pytest.mark.parametrize("where", ["nowhere", "loop", "thread"])
def test_a_program_exits_while_its_reading_threads_run(where, packing):
    start = time.monotonic()
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(where=where, packing=packing)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    fails = where != "nowhere"
    assert process.returncode == fails, process.stderr
    assert ("RuntimeError: on purpose" in process.stderr) if fails else (process.stdout == "done\n")
    assert ("while reading document 5 of first" in process.stderr) == (where == "thread")
    assert time.monotonic() - start < 60, "the exit does not wait for threads"
