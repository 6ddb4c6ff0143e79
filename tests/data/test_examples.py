"""One example: its layout, its random choices, and errors that name the document."""

import numpy as np
import pytest

from leon_jax.config import UserError
from leon_jax.data.config import MixtureComponent
from leon_jax.data.examples import Component, MakeExample, join
from leon_jax.documents import Document, Image, Provenance, Text
from tests.data.little import (
    CONFIG,
    DOCUMENTS,
    IMAGE_SHAPE,
    NEVER,
    component,
    make,
    make_tokenizer,
    take,
    unpack,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_join_has_the_layout_of_the_tokenizer(tokenizer):
    encoded = [tokenizer.encode(document) for document in DOCUMENTS[:3]]
    ids, query_start = join(encoded[2], encoded[:2], tokenizer.vocabulary)
    np.testing.assert_array_equal(ids, tokenizer.encode(DOCUMENTS[:3]))
    np.testing.assert_array_equal(ids[query_start:], encoded[2][1:])


def shaded(index, variant):
    """A document whose image has the number of the variant as all its codes."""
    return Document(
        (DOCUMENTS[index].parts[0], Image(codes=np.full(IMAGE_SHAPE, variant, np.int32)))
    )


def test_all_images_of_an_example_are_in_one_variant(tokenizer):
    batches = make(tokenizer, CONFIG, NEVER, variant=shaded, variants=6, plain_variants=2)
    start, image_size = tokenizer.vocabulary.image_start, IMAGE_SHAPE[0] * IMAGE_SHAPE[1]
    seen = {True: set(), False: set()}
    for batch in take(iter(batches), 40):
        for ids, _ in unpack(batch, tokenizer.vocabulary.eos):
            codes = ids[tokenizer.vocabulary.is_image(ids)] - start
            assert len(set(codes.tolist())) == 1, "an image is in another variant"
            seen[len(codes) > image_size].add(int(codes[0]))
    assert seen[True] == set(range(6)), "examples with retrieved documents use all variants"
    assert seen[False] == {0, 1}, "examples without them use only plain variants"


def test_some_examples_use_unchanged_images(tokenizer):
    others = {"retrieved": (0.0, 1.0), "variant": shaded, "variants": 6, "unchanged": 0.5}
    start, counts = tokenizer.vocabulary.image_start, np.zeros(6)
    for batch in take(iter(make(tokenizer, CONFIG, NEVER, **others)), 40):
        for ids, _ in unpack(batch, tokenizer.vocabulary.eos):
            codes = ids[tokenizer.vocabulary.is_image(ids)] - start
            counts[int(codes[0])] += 1
    share, expected = counts[0] / counts.sum(), 0.5 + 0.5 / 6
    assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / counts.sum())


def test_queries_are_sampled_by_their_weights(tokenizer):
    weights = np.ones(len(DOCUMENTS))
    weights[5], weights[7] = 12.0, 0.0
    counts = np.zeros(len(DOCUMENTS))
    for batch in take(
        iter(make(tokenizer, CONFIG, NEVER, retrieved=(1.0,), query_weights=weights)), 60
    ):
        for ids, _ in unpack(batch, tokenizer.vocabulary.eos):
            counts[int(tokenizer.decode(ids).text.split()[0])] += 1
    expected = weights / weights.sum() * counts.sum()
    assert counts[7] == 0
    others = np.delete(np.arange(len(DOCUMENTS)), 7)
    statistic = ((counts[others] - expected[others]) ** 2 / expected[others]).sum()
    assert statistic < 50, "chi-square with 21 degrees of freedom; 0.04 % of samples exceed 50"


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"documents": []}, "training data is empty"),
        ({"weight": 0.0}, r"weight is 0\.0; it must be above 0"),
        ({"retrieved": (0.5, 0.6)}, "probabilities must sum to 1"),
        ({"variants": 4}, "variants is 4, but the data has no variants"),
        ({"variants": 2, "plain_variants": 3, "variant": shaded}, "plain_variants is 3"),
        ({"unchanged": 1.5}, r"unchanged is 1\.5"),
        ({"query_weights": np.ones(3)}, "has 3 weights for 23 documents"),
    ],
)
def test_invalid_settings_raise_an_error(others, message):
    with pytest.raises(UserError, match=message):
        component(**{"retrieved": (1.0,), **others})


def test_settings_have_defaults():
    settings = Component(MixtureComponent("web"), DOCUMENTS).settings
    assert (settings.retrieved, settings.variants) == ((1.0,), 1)
    assert (settings.unchanged, settings.balance) == (0.0, 0.0)


def example(tokenizer, documents, index=4):
    return MakeExample(documents, tokenizer, NEVER)(index, np.random.default_rng(0))


def test_an_error_of_encoding_names_the_query_or_the_neighbour(tokenizer):
    documents = list(DOCUMENTS)
    documents[5] = Document((Text("no codes"), Image(pixels=np.zeros((4, 4, 3), np.uint8))))
    for index, retrieved in ((5, (1.0,)), (4, (0.0, 1.0))):
        broken = component(documents, retrieved=retrieved, folder="data/web")
        with pytest.raises(UserError, match=r"^document 5 of data/web \(train\): the image has"):
            example(tokenizer, broken, index)


def test_an_error_names_the_key_of_a_document(tokenizer):
    documents = list(DOCUMENTS)
    origin = Provenance("cats/5", "web", "CC0-1.0", "me")
    documents[5] = Document((Text("no codes"), Image(pixels=np.zeros((4, 4, 3), np.uint8))), origin)
    with pytest.raises(UserError, match=r"^document 5 \(cats/5\) of web \(train\): the image has"):
        example(tokenizer, component(documents, folder="web"), 5)


class Failing:
    """A source that raises an OSError for one document."""

    def __len__(self):
        return len(DOCUMENTS)

    def __getitem__(self, index):
        if index == 5:
            raise OSError("the disk is gone")
        return DOCUMENTS[index]


def test_other_exceptions_pass_through_with_notes_that_name_the_documents(tokenizer):
    with pytest.raises(OSError, match="the disk is gone") as error:
        example(tokenizer, component(Failing(), retrieved=(0.0, 1.0)))
    assert error.value.__notes__ == [
        "while reading document 5 of little (train)",
        "while building an example of document 4 of little (train)",
    ]  # fmt: skip
