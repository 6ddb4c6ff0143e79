"""Rows: whole examples side by side, or one stream that is cut."""

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
def test_shapes_and_padding(tokenizer, config):
    for batch in take(iter(make(tokenizer, config)), 5):
        assert set(batch) == {"ids", "targets", "weights", "segment_ids", "positions"}
        for name, array in batch.items():
            assert array.shape == (4, config.length)
            assert array.dtype == (np.float32 if name == "weights" else np.int32)
        padding = batch["segment_ids"] == 0
        assert (batch["weights"][padding] == 0).all() and (batch["weights"][~padding] == 1).all()
        assert (batch["ids"][padding] == tokenizer.vocabulary.pad).all()
        assert config.packing == "whole" or not padding.any()


def test_every_packed_document_is_whole_and_is_its_query_behind_its_neighbours(tokenizer):
    vocabulary = tokenizer.vocabulary
    possible = {}
    for index in range(len(DOCUMENTS)):
        for number in range(3):
            documents = [DOCUMENTS[i] for i in [*ring(None, index, number), index]]
            possible[tuple(tokenizer.encode(documents).tolist())] = number
    numbers = []
    for batch in take(iter(make(tokenizer)), 40):
        for ids, _ in unpack(batch, vocabulary.eos):
            numbers.append(possible[tuple(unmask(ids, vocabulary).tolist())])
    shares = np.bincount(numbers, minlength=3) / len(numbers)
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
                here = np.flatnonzero(segments == segment)
                ids = batch["ids"][row, here]
                expected = vocabulary.positions(ids, 8)
                np.testing.assert_array_equal(positions[here], expected)
                after = expected[1:][ids[:-1] == vocabulary.break_id]
                assert not (after % 8).any()
                ends.add(int(expected[-1]))
        assert list(unpack(batch, vocabulary.eos, gaps=True))
    assert max(ends) < 60
    # Retrieved documents were left out to keep within the positions; a query alone never is.
    with pytest.raises(UserError, match="the model has 9, so raise its max_length"):
        next(iter(make(tokenizer, part_step=8, max_positions=9)))


def test_a_document_longer_than_a_row_is_named(tokenizer):
    config = DataConfig(length=10, threads=1)
    with pytest.raises(UserError, match=r"document \d+ of .* has \d+ tokens, but a row holds 11"):
        next(iter(make(tokenizer, config, batch_size=1)))


def all_examples(tokenizer, config, count, **others):
    """The examples of `make(tokenizer, config, **others)`, before they are packed."""
    found = pipeline.examples([component(**others)], tokenizer, config, MaskingConfig())
    return [found[i] for i in range(count)]


@pytest.mark.parametrize("length", [7, 32, 200])
def test_in_the_stream_every_token_is_a_target_once_but_for_the_first_of_an_example(
    tokenizer, length
):
    """Examples have 12 to 80 tokens: a row holds less than one of them, or several."""
    config = dataclasses.replace(STREAM, length=length)
    batches = take(iter(make(tokenizer, config, retrieved=(0, 0, 0, 1.0))), 20)
    rows = {name: np.concatenate([b[name] for b in batches]).ravel() for name in batches[0]}
    examples = all_examples(tokenizer, config, 400, retrieved=(0, 0, 0, 1.0))
    possible = {
        tokenizer.encode([DOCUMENTS[i] for i in [*ring(None, index, 3), index]]).tobytes()
        for index in range(len(DOCUMENTS))
    }
    for each in examples:
        masked = np.append(each["ids"], each["targets"][-1])
        assert unmask(masked, tokenizer.vocabulary).tobytes() in possible, "all four documents"
        np.testing.assert_array_equal(each["targets"], masked[1:])
    stream = np.concatenate([each["targets"] for each in examples])
    assert len(stream) > len(rows["targets"])
    np.testing.assert_array_equal(rows["targets"], stream[: len(rows["targets"])])
    inputs = np.concatenate([each["ids"] for each in examples])
    np.testing.assert_array_equal(rows["ids"], inputs[: len(rows["ids"])])


def test_in_the_stream_segments_are_the_pieces_of_examples_and_positions_count_in_them(tokenizer):
    config = STREAM
    batches = take(iter(make(tokenizer, config)), 10)
    segments = np.concatenate([batch["segment_ids"] for batch in batches])
    positions = np.concatenate([batch["positions"] for batch in batches])
    sizes = [len(each["ids"]) for each in all_examples(tokenizer, config, 400)]
    owner = np.repeat(np.arange(400), sizes)[: segments.size].reshape(segments.shape)
    cut = 0
    for row in range(len(segments)):
        _, expected, counts = np.unique(owner[row], return_inverse=True, return_counts=True)
        np.testing.assert_array_equal(segments[row], expected + 1)
        np.testing.assert_array_equal(positions[row], np.concatenate([*map(np.arange, counts)]))
        cut += row > 0 and owner[row, 0] == owner[row - 1, -1]
    assert cut > len(segments) / 2, "most borders cut an example"


def numbers():
    """Examples of 1 to 7 tokens, told apart by their ids."""
    data = grain.MapDataset.range(50).map(
        lambda i: dict.fromkeys(("ids", "targets", "weights"), 100 * i + np.arange(1 + i % 7))
    )
    return data.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=1))


@pytest.mark.parametrize("length", [1, 3, 4, 28, 60])
def test_the_stream_goes_on_from_every_state_after_it_was_json(length):
    iterator, states, rows = iter(Stream(numbers(), length)), [], []
    for _ in range(sum(1 + i % 7 for i in range(50)) // length):
        states.append(json.dumps(iterator.get_state()))
        rows.append(next(iterator)["ids"])
    with pytest.raises(StopIteration):
        next(iterator)
    for start, state in enumerate(states):
        again = iter(Stream(numbers(), length))
        again.set_state(json.loads(state))
        assert json.dumps(again.get_state()) == state
        for expected in rows[start : start + 3]:
            np.testing.assert_array_equal(next(again)["ids"], expected)


def test_a_stream_is_not_cut_where_parts_have_places_of_their_own(tokenizer):
    with pytest.raises(UserError, match=r"part_step is 32, but .* model\.part_step to 1 or data"):
        make(tokenizer, STREAM, part_step=32)
