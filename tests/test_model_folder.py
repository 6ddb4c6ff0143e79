"""What fits the context is counted in positions, with and without gaps between parts."""

import dataclasses

import numpy as np
import pytest

from leon_jax.config import UserError
from leon_jax.documents import Document, Hole, Image, Text
from leon_jax.model_folder import ModelFolder
from tests import tiny


@pytest.fixture(params=[1, 8])
def folder(request) -> ModelFolder:
    opened = ModelFolder.open(tiny.folders()[0])
    config = dataclasses.replace(opened.config, part_step=request.param)
    return dataclasses.replace(opened, config=config)


def documents(count: int) -> list[Document]:
    picture = Image(codes=np.zeros((tiny.GRID, tiny.GRID), np.int32))
    # Of many lengths: in another order they take another number of positions.
    return [Document((Text(name * n), picture)) for n, name in enumerate(tiny.CONCEPTS[:count], 1)]


def test_as_many_documents_are_kept_as_positions_hold(folder):
    query = Document((Text("cat"), Hole("image")))
    answer = folder.tokenizer.image_tokens
    step = folder.config.part_step

    def used(retrieved: list[Document]) -> int:
        # The most relevant is read last.
        ids = folder.tokenizer.encode([*retrieved[::-1], query])
        return folder.tokenizer.vocabulary.extent(ids, step) + 1 + answer

    everything = documents(6)
    for context in range(used([]), used(everything) + 1, 3):
        config = dataclasses.replace(folder.config, max_length=context)
        small = dataclasses.replace(folder, config=config)
        kept = small.select_fitting(everything, query, answer)
        assert kept[::-1] == everything[: len(kept)] and used(kept) <= context
        assert len(kept) == 6 or used(everything[: len(kept) + 1]) > context


def test_no_number_of_documents_is_refused_that_could_fit(folder):
    """The limit named is that of one-token texts."""
    prompt, step = "cat", folder.config.part_step
    tokenizer, vocabulary = folder.tokenizer, folder.tokenizer.vocabulary
    query = tokenizer.encode(Document((Text(prompt), Hole("image"))))
    least = [vocabulary.text_start, vocabulary.break_id]
    least += [vocabulary.image_start] * tokenizer.image_tokens + [vocabulary.break_id]
    for count in (1, 2, 3):
        ids = [query[0], *least * count, *query[1:]]
        needed = vocabulary.extent(ids, step) + tokenizer.image_tokens
        enough = dataclasses.replace(
            folder, config=dataclasses.replace(folder.config, max_length=needed)
        )
        enough.check_prompt(prompt, count)
        with pytest.raises(UserError, match=f"holds at most {count}"):
            enough.check_prompt(prompt, count + 1)
