"""Packing: whole examples, or a stream that is split into rows."""

import dataclasses
import json

import grain
import numpy as np
import pytest

from leon_jax.config import UserError
from leon_jax.data import pipeline
from leon_jax.data.config import DataConfig
from leon_jax.data.masking import MaskingConfig, unmask
from leon_jax.data.packing import Stream
from tests.data.little import (
    CONFIG,
    DOCUMENTS,
    component,
    make,
    make_tokenizer,
    ring,
    take,
    unpack,
)  # fmt: skip

STREAM = dataclasses.replace(CONFIG, packing="stream", length=32)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.mark.parametrize("config", [CONFIG, STREAM], ids=lambda config: config.packing)
def test_batches_have_their_shapes_and_padding(tokenizer, config):
    for batch in take(iter(make(tokenizer, config)), 5):
        assert set(batch) == {"ids", "targets", "weights", "segment_ids", "positions"}
        for name, array in batch.items():
            assert array.shape == (4, config.length)
            assert array.dtype == (np.float32 if name == "weights" else np.int32)
        padding = batch["segment_ids"] == 0
        assert (batch["weights"][padding] == 0).all() and (batch["weights"][~padding] == 1).all()
        assert (batch["ids"][padding] == tokenizer.vocabulary.pad).all()
        assert config.packing == "whole" or not padding.any()


def test_every_packed_example_is_complete_with_its_neighbours_before_the_query(tokenizer):
    vocabulary = tokenizer.vocabulary
    possible = {}
    for index in range(len(DOCUMENTS)):
        for count in range(3):
            documents = [DOCUMENTS[i] for i in [*ring(None, index, count), index]]
            possible[tuple(tokenizer.encode(documents).tolist())] = count
    counts = []
    for batch in take(iter(make(tokenizer)), 40):
        for ids, _ in unpack(batch, vocabulary.eos):
            counts.append(possible[tuple(unmask(ids, vocabulary).tolist())])
    shares = np.bincount(counts, minlength=3) / len(counts)
    np.testing.assert_allclose(shares, [0.4, 0.3, 0.3], atol=0.08)


def test_retrieved_documents_that_do_not_fit_are_left_out(tokenizer):
    config = DataConfig(length=40, threads=0)
    breaks = [
        (unmask(ids, tokenizer.vocabulary) == tokenizer.vocabulary.break_id).sum()
        for batch in take(iter(make(tokenizer, config, batch_size=2, retrieved=(0, 0, 1.0))), 20)
        for ids, _ in unpack(batch, tokenizer.vocabulary.eos)
    ]
    assert set(breaks) <= {1, 3} and 1 in breaks


def test_parts_start_at_multiples_of_the_part_step(tokenizer):
    vocabulary, ends = tokenizer.vocabulary, set()
    for batch in take(iter(make(tokenizer, part_step=8, max_positions=60)), 10):
        for row in range(len(batch["ids"])):
            segments, positions = batch["segment_ids"][row], batch["positions"][row]
            for segment in range(1, segments.max() + 1):
                columns = np.flatnonzero(segments == segment)
                ids = batch["ids"][row, columns]
                expected = vocabulary.positions(ids, 8)
                np.testing.assert_array_equal(positions[columns], expected)
                after = expected[1:][ids[:-1] == vocabulary.break_id]
                assert not (after % 8).any()
                ends.add(int(expected[-1]))
        assert list(unpack(batch, vocabulary.eos, gaps=True))
    assert max(ends) < 60
    # Retrieved documents are left out to fit the positions; a query is never left out.
    with pytest.raises(UserError, match="the model has 9, so raise its max_length"):
        next(iter(make(tokenizer, part_step=8, max_positions=9)))


def test_a_document_longer_than_a_row_raises_an_error(tokenizer):
    config = DataConfig(length=10, threads=1)
    with pytest.raises(UserError, match=r"document \d+ of .* has \d+ tokens, but a row holds 11"):
        next(iter(make(tokenizer, config, batch_size=1)))


def all_examples(tokenizer, config, count, **others):
    """The examples of `make(tokenizer, config, **others)`, before they are packed."""
    examples = pipeline.examples([component(**others)], tokenizer, config, MaskingConfig())
    return [examples[index] for index in range(count)]


@pytest.mark.parametrize("length", [7, 32, 200])
def test_in_a_stream_every_token_except_the_first_of_an_example_is_a_target_once(tokenizer, length):
    """Examples have 12 to 80 tokens, so a row holds a part of an example or several examples."""
    config = dataclasses.replace(STREAM, length=length)
    batches = take(iter(make(tokenizer, config, retrieved=(0, 0, 0, 1.0))), 20)
    rows = {name: np.concatenate([b[name] for b in batches]).ravel() for name in batches[0]}
    examples = all_examples(tokenizer, config, 400, retrieved=(0, 0, 0, 1.0))
    possible = {
        tokenizer.encode([DOCUMENTS[i] for i in [*ring(None, index, 3), index]]).tobytes()
        for index in range(len(DOCUMENTS))
    }
    for example in examples:
        masked = np.append(example["ids"], example["targets"][-1])
        assert unmask(masked, tokenizer.vocabulary).tobytes() in possible, "all four documents"
        np.testing.assert_array_equal(example["targets"], masked[1:])
    stream = np.concatenate([example["targets"] for example in examples])
    assert len(stream) > len(rows["targets"])
    np.testing.assert_array_equal(rows["targets"], stream[: len(rows["targets"])])
    inputs = np.concatenate([example["ids"] for example in examples])
    np.testing.assert_array_equal(rows["ids"], inputs[: len(rows["ids"])])


def test_in_a_stream_each_piece_of_an_example_is_a_segment_with_positions_from_0(tokenizer):
    config = STREAM
    batches = take(iter(make(tokenizer, config)), 10)
    segments = np.concatenate([batch["segment_ids"] for batch in batches])
    positions = np.concatenate([batch["positions"] for batch in batches])
    sizes = [len(example["ids"]) for example in all_examples(tokenizer, config, 400)]
    indices = np.repeat(np.arange(400), sizes)[: segments.size].reshape(segments.shape)
    splits = 0
    for row in range(len(segments)):
        _, expected, counts = np.unique(indices[row], return_inverse=True, return_counts=True)
        np.testing.assert_array_equal(segments[row], expected + 1)
        np.testing.assert_array_equal(positions[row], np.concatenate([*map(np.arange, counts)]))
        splits += row > 0 and indices[row, 0] == indices[row - 1, -1]
    assert splits > len(segments) / 2, "most rows split an example"


def numbered_examples():
    """Examples of 1 to 7 tokens with different ids."""
    data = grain.MapDataset.range(50).map(
        lambda i: dict.fromkeys(("ids", "targets", "weights"), 100 * i + np.arange(1 + i % 7))
    )
    return data.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=1))


@pytest.mark.parametrize("length", [1, 3, 4, 28, 60])
def test_a_stream_resumes_from_every_state_in_json(length):
    iterator, states, rows = iter(Stream(numbered_examples(), length)), [], []
    for _ in range(sum(1 + i % 7 for i in range(50)) // length):
        states.append(json.dumps(iterator.get_state()))
        rows.append(next(iterator)["ids"])
    with pytest.raises(StopIteration):
        next(iterator)
    for start, state in enumerate(states):
        resumed = iter(Stream(numbered_examples(), length))
        resumed.set_state(json.loads(state))
        assert json.dumps(resumed.get_state()) == state
        for expected in rows[start : start + 3]:
            np.testing.assert_array_equal(next(resumed)["ids"], expected)


def test_a_stream_with_a_part_step_raises_an_error(tokenizer):
    with pytest.raises(UserError, match=r"part_step is 32, but .* model\.part_step to 1 or data"):
        make(tokenizer, STREAM, part_step=32)
