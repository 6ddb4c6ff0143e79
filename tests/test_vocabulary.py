"""The joint id layout."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leon_jax.vocabulary import Vocabulary


def test_the_default_layout_is_that_of_cm3leon():
    """56,320 text ids and 8,192 image codes in 65,536 ids; Chameleon's <eoss> and <break> agree."""
    vocabulary = Vocabulary()
    assert vocabulary.size == 65_536
    assert (vocabulary.bos, vocabulary.pad, vocabulary.eos, vocabulary.unk) == (0, 1, 2, 3)
    assert (vocabulary.image_start, vocabulary.image_stop) == (4, 8196)
    assert (vocabulary.eoss, vocabulary.break_id) == (8196, 8197)
    assert (vocabulary.sentinel(0), vocabulary.sentinel(511)) == (8198, 8709)
    assert (vocabulary.text_start, vocabulary.text_stop) == (9216, 65_536)


def test_the_layout_of_chameleon_is_a_vocabulary():
    vocabulary = Vocabulary(sentinels=0, text_start=8198, text_tokens=65_536 - 8198)
    assert vocabulary.size == 65_536
    with pytest.raises(ValueError, match="this vocabulary has 0"):
        vocabulary.sentinel(0)


def test_the_first_id_of_a_part_has_the_next_multiple_as_its_position():
    vocabulary = Vocabulary.compact(image_codes=4, text_tokens=4, sentinels=1)
    eos, break_id, text = vocabulary.eos, vocabulary.break_id, vocabulary.text_start
    ids = np.array([eos, text, break_id, 4, 5, 6, 7, break_id, text, text, break_id])
    np.testing.assert_array_equal(vocabulary.positions(ids), np.arange(11))
    np.testing.assert_array_equal(
        vocabulary.positions(ids, 4), [0, 1, 2, 4, 5, 6, 7, 8, 12, 13, 14]
    )
    assert vocabulary.extent(ids, 4) == 16 and vocabulary.extent(ids[:-1], 4) == 14
    assert vocabulary.extent(ids) == 11


@settings(deadline=None)
@given(
    codes=st.integers(1, 300),
    text=st.integers(1, 300),
    sentinels=st.integers(0, 20),
    multiple=st.sampled_from([1, 8, 128]),
)
def test_every_id_is_of_exactly_one_kind(codes, text, sentinels, multiple):
    vocabulary = Vocabulary.compact(codes, text, sentinels, multiple)
    ids = np.arange(vocabulary.size)
    kinds = [vocabulary.is_image(ids), vocabulary.is_sentinel(ids), vocabulary.is_text(ids)]
    assert [kind.sum() for kind in kinds] == [codes, sentinels, text]
    controls = [vocabulary.bos, vocabulary.pad, vocabulary.eos, vocabulary.unk]
    controls += [vocabulary.eoss, vocabulary.break_id]
    assert len(set(controls)) == 6
    counts = np.sum(kinds, axis=0)
    counts[controls] += 1
    assert counts.max() == 1
    reserved = (counts == 0).sum()
    assert reserved == vocabulary.text_start - vocabulary.sentinel_stop < multiple
    assert vocabulary.size % multiple == 0


def test_the_kind_of_an_id_is_known_for_ints_and_arrays():
    vocabulary = Vocabulary.compact(image_codes=8, text_tokens=300)
    assert vocabulary.is_image(4) and not vocabulary.is_image(12)
    assert jnp.array_equal(
        vocabulary.is_image(jnp.array([3, 4, 11, 12])), [False, True, True, False]
    )


@pytest.mark.parametrize(
    ("token", "name"),
    [
        (2, "</s>"),
        (4, "<image:0>"),
        (8196, "<eoss>"),
        (8197, "<break>"),
        (8199, "<sentinel:1>"),
        (9000, "<reserved:9000>"),
        (9226, "<text:10>"),
        (65_536, "<outside:65536>"),
        (-1, "<outside:-1>"),
    ],
)
def test_names_of_ids(token, name):
    assert Vocabulary().name(token) == name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_codes": 0}, "image_codes is 0; it must be at least 1"),
        ({"text_tokens": -5}, "text_tokens is -5"),
        ({"text_start": 8000}, "text_start is 8000; .* at least 8710"),
    ],
)
def test_impossible_layouts_are_rejected(arguments, message):
    with pytest.raises(ValueError, match=message):
        Vocabulary(**arguments)


def test_a_sentinel_out_of_range_is_an_error():
    with pytest.raises(ValueError, match="no <sentinel:512>"):
        Vocabulary().sentinel(512)
    with pytest.raises(ValueError, match="no <sentinel:-1>"):
        Vocabulary().sentinel(-1)
