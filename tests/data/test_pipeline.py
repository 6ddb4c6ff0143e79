"""The decoder's data: whole documents in rows, aligned targets, exact resumption, clean endings."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import grain
import numpy as np
import pytest

from leon_jax.config import UserError
from leon_jax.data import pipeline
from leon_jax.data.masking import MaskingConfig, unmask
from leon_jax.data.pipeline import PipelineConfig, join
from leon_jax.documents import Document, Image, Text
from leon_jax.tokenizers.documents import DocumentTokenizer
from leon_jax.tokenizers.text import TextTokenizer
from leon_jax.vocabulary import Vocabulary

PICTURE = (2, 3)
WORDS = ("red", "green", "blue", "heart", "star", "cat")


def make_documents(count):
    rng = np.random.default_rng(0)
    return [
        Document(
            (
                Text(f"{i} {' '.join(rng.choice(WORDS, 1 + i % 3))}"),
                Image(codes=rng.integers(0, 16, PICTURE).astype(np.int32)),
            )
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def tokenizer():
    text = TextTokenizer.train(WORDS, 280)
    vocabulary = Vocabulary.compact(image_codes=16, text_tokens=text.size, sentinels=8)
    return DocumentTokenizer(vocabulary, text, PICTURE)


DOCUMENTS = make_documents(23)
CONFIG = PipelineConfig(length=80, batch_size=4, retrieved=(0.4, 0.3, 0.3), threads=1)


def ring(rng, index, number):
    """A stub of retrieval: the documents after this one."""
    return [(index + 1 + i) % len(DOCUMENTS) for i in range(number)]


def make(tokenizer, config=CONFIG, masking=None, documents=DOCUMENTS, **others):
    others = {"neighbours": ring, **others}
    return pipeline.make(documents, tokenizer, config, masking or MaskingConfig(), **others)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def unpack(batch, eos, gaps=False):
    """(ids, weights) of every document of a batch: inputs plus the last target."""
    for row in range(len(batch["ids"])):
        segments = batch["segment_ids"][row]
        for segment in range(1, segments.max() + 1):
            here = np.flatnonzero(segments == segment)
            assert (np.diff(here) == 1).all()
            ids, targets = batch["ids"][row, here], batch["targets"][row, here]
            np.testing.assert_array_equal(ids[1:], targets[:-1])
            if not gaps:
                np.testing.assert_array_equal(batch["positions"][row, here], np.arange(len(here)))
            assert ids[0] == eos
            yield np.append(ids, targets[-1]), batch["weights"][row, here]


def test_parts_start_at_multiples_of_the_part_step(tokenizer):
    config = dataclasses.replace(CONFIG, part_step=8, max_positions=60)
    vocabulary, ends = tokenizer.vocabulary, set()
    for batch in take(iter(make(tokenizer, config)), 10):
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
        next(iter(make(tokenizer, dataclasses.replace(config, max_positions=9))))


def test_shapes_and_padding(tokenizer):
    for batch in take(iter(make(tokenizer)), 5):
        assert set(batch) == {"ids", "targets", "weights", "segment_ids", "positions"}
        for name, array in batch.items():
            assert array.shape == (4, 80)
            assert array.dtype == (np.float32 if name == "weights" else np.int32)
        padding = batch["segment_ids"] == 0
        assert (batch["weights"][padding] == 0).all() and (batch["weights"][~padding] == 1).all()
        assert (batch["ids"][padding] == tokenizer.vocabulary.pad).all()


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


def test_an_epoch_holds_every_document_once_and_epochs_differ(tokenizer):
    config = PipelineConfig(length=80, batch_size=1, packing_bins=1, threads=0)
    names = {tokenizer.encode(d).tobytes(): i for i, d in enumerate(DOCUMENTS)}
    order = []
    for batch in take(iter(make(tokenizer, config)), 30):
        for ids, _ in unpack(batch, tokenizer.vocabulary.eos):
            order.append(names[unmask(ids, tokenizer.vocabulary).tobytes()])
    count = len(DOCUMENTS)
    # Packing may swap neighbours across the border of an epoch, so counts may differ by one.
    assert set(order[:count]) | set(order[count : count + 4]) == set(range(count))
    assert order[:10] != order[count : count + 10]


def test_masks_differ_between_epochs(tokenizer):
    config = PipelineConfig(length=80, batch_size=1, threads=0)
    masking = MaskingConfig(spans="fim")
    seen = {}
    for batch in take(iter(make(tokenizer, config, masking)), 60):
        for ids, _ in unpack(batch, tokenizer.vocabulary.eos):
            seen.setdefault(unmask(ids, tokenizer.vocabulary).tobytes(), set()).add(ids.tobytes())
    assert np.mean([len(instances) > 1 for instances in seen.values()]) > 0.9


@pytest.mark.parametrize("threads", [0, 2])
def test_an_iterator_resumes_exactly_from_every_batch(tokenizer, threads):
    config = PipelineConfig(80, 3, retrieved=(0.4, 0.3, 0.3), packing_bins=3, threads=threads)
    iterator, states, batches = iter(make(tokenizer, config)), [], []
    for _ in range(12):
        states.append(iterator.get_state())
        batches.append(next(iterator))
    for start in range(0, 12, 2):
        resumed = iter(make(tokenizer, config))
        resumed.set_state(states[start])
        for expected in batches[start:]:
            found = next(resumed)
            for name in expected:
                np.testing.assert_array_equal(found[name], expected[name])


def test_grain_agrees_that_checkpoints_are_exact(tokenizer):
    first = grain.experimental.LimitIterDataset(make(tokenizer), 6)
    grain.experimental.assert_equal_output_after_checkpoint(first)


def test_two_processes_read_disjoint_documents(tokenizer):
    config = PipelineConfig(length=80, batch_size=1, packing_bins=1, threads=0)
    halves = []
    for shard in range(2):
        iterator, seen = iter(make(tokenizer, config, shard=(shard, 2))), []
        while len(seen) < len(DOCUMENTS) // 2:
            for ids, _ in unpack(next(iterator), tokenizer.vocabulary.eos):
                seen.append(unmask(ids, tokenizer.vocabulary).tobytes())
        halves.append(set(seen[: len(DOCUMENTS) // 2 - 3]))
    assert not halves[0] & halves[1]


def test_retrieved_documents_that_do_not_fit_are_left_out(tokenizer):
    config = PipelineConfig(length=40, batch_size=2, retrieved=(0, 0, 1.0), threads=0)
    breaks = [
        (unmask(ids, tokenizer.vocabulary) == tokenizer.vocabulary.break_id).sum()
        for batch in take(iter(make(tokenizer, config)), 20)
        for ids, _ in unpack(batch, tokenizer.vocabulary.eos)
    ]
    assert set(breaks) <= {1, 3} and 1 in breaks


def test_join_is_the_tokenizers_own_layout(tokenizer):
    encoded = [tokenizer.encode(document) for document in DOCUMENTS[:3]]
    ids, query_start = join(encoded[2], encoded[:2], tokenizer.vocabulary)
    np.testing.assert_array_equal(ids, tokenizer.encode(DOCUMENTS[:3]))
    np.testing.assert_array_equal(ids[query_start:], encoded[2][1:])


def test_a_document_longer_than_a_row_is_named(tokenizer):
    config = PipelineConfig(length=10, batch_size=1, threads=1)
    with pytest.raises(UserError, match=r"document \d+ has \d+ tokens, but a row holds 11"):
        next(iter(make(tokenizer, config)))


def test_wrong_settings_are_named(tokenizer):
    with pytest.raises(UserError, match="probabilities must sum to 1"):
        PipelineConfig(80, 4, retrieved=(0.5, 0.6))
    with pytest.raises(UserError, match="training data is empty"):
        make(tokenizer, documents=[])
    with pytest.raises(UserError, match="shard"):
        make(tokenizer, shard=(2, 2))


PROGRAM = """
import sys
sys.path.insert(0, {folder!r})
import test_pipeline as t
text = t.TextTokenizer.train(t.WORDS, 280)
vocabulary = t.Vocabulary.compact(image_codes=16, text_tokens=text.size, sentinels=8)
iterator = iter(t.make(t.DocumentTokenizer(vocabulary, text, t.PICTURE)))
next(iterator)
if {fails}:
    raise RuntimeError("on purpose")
print("done")
"""


@pytest.mark.parametrize("fails", [False, True])
def test_a_program_ends_while_its_reading_threads_run(fails):
    folder = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(folder=str(folder), fails=fails)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(folder.parents[1])},
    )
    assert done.returncode == fails, done.stderr
    assert ("on purpose" in done.stderr) if fails else (done.stdout == "done\n")


def shaded(index, variant):
    """A document whose picture tells the variant: all its codes are that number."""
    return Document((DOCUMENTS[index].parts[0], Image(codes=np.full(PICTURE, variant, np.int32))))


def test_an_example_shows_all_its_pictures_in_one_variant(tokenizer):
    config = dataclasses.replace(CONFIG, variants=6, plain_variants=2)
    never = MaskingConfig(spans="fixed", count=0)
    batches = take(iter(make(tokenizer, config, never, variant=shaded)), 40)
    start, pictures = tokenizer.vocabulary.image_start, PICTURE[0] * PICTURE[1]
    seen = {True: set(), False: set()}
    for batch in batches:
        for ids, _ in unpack(batch, tokenizer.vocabulary.eos):
            codes = ids[tokenizer.vocabulary.is_image(ids)] - start
            assert len(set(codes.tolist())) == 1, "a picture of another variant"
            seen[len(codes) > pictures].add(int(codes[0]))
    assert seen[True] == set(range(6)), "retrieved documents come in every variant"
    assert seen[False] == {0, 1}, "without any, only plain ones"


def test_some_examples_take_their_pictures_unchanged(tokenizer):
    config = dataclasses.replace(CONFIG, retrieved=(0.0, 1.0), variants=6, unchanged=0.5)
    never = MaskingConfig(spans="fixed", count=0)
    start, counts = tokenizer.vocabulary.image_start, np.zeros(6)
    for batch in take(iter(make(tokenizer, config, never, variant=shaded)), 40):
        for ids, _ in unpack(batch, tokenizer.vocabulary.eos):
            codes = ids[tokenizer.vocabulary.is_image(ids)] - start
            counts[int(codes[0])] += 1
    share, expected = counts[0] / counts.sum(), 0.5 + 0.5 / 6
    assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / counts.sum())
    with pytest.raises(UserError, match=r"unchanged is 1\.5"):
        dataclasses.replace(CONFIG, unchanged=1.5)


def test_weights_decide_how_often_a_document_is_a_query(tokenizer):
    weights = np.ones(len(DOCUMENTS))
    weights[5], weights[7] = 12.0, 0.0
    config = dataclasses.replace(CONFIG, retrieved=(1.0,))
    never = MaskingConfig(spans="fixed", count=0)
    iterator = iter(make(tokenizer, config, never, weights=weights))
    counts = np.zeros(len(DOCUMENTS))
    for batch in take(iterator, 60):
        for ids, _ in unpack(batch, tokenizer.vocabulary.eos):
            counts[int(tokenizer.decode(ids).text.split()[0])] += 1
    expected = weights / weights.sum() * counts.sum()
    assert counts[7] == 0
    others = np.delete(np.arange(len(DOCUMENTS)), 7)
    statistic = ((counts[others] - expected[others]) ** 2 / expected[others]).sum()
    assert statistic < 50, "chi-square with 21 degrees of freedom; 0.04 % of samples exceed 50"


def test_variants_and_weights_that_do_not_fit_are_named(tokenizer):
    config = dataclasses.replace(CONFIG, variants=4)
    with pytest.raises(UserError, match="variants is 4, but the data holds none"):
        make(tokenizer, config)
    with pytest.raises(UserError, match="3 weights were given for 23 documents"):
        make(tokenizer, weights=np.ones(3))
    with pytest.raises(UserError, match="plain_variants is 3"):
        dataclasses.replace(CONFIG, variants=2, plain_variants=3)
