"""The context limits are numbers of positions, with and without gaps between parts."""

import dataclasses

import numpy as np
import pytest

from leon_jax.config import UserError
from leon_jax.documents import Document, Hole, Image, Text
from leon_jax.generate import context_limits
from leon_jax.model_folder import ModelFolder
from tests import tiny


@pytest.fixture(params=[1, 8])
def folder(request) -> ModelFolder:
    opened = ModelFolder.open(tiny.folders()[0])
    config = dataclasses.replace(opened.config, part_step=request.param)
    return dataclasses.replace(opened, config=config)


def documents(count: int) -> list[Document]:
    image = Image(codes=np.zeros((tiny.GRID, tiny.GRID), np.int32))
    # The lengths differ, so another order has another number of positions.
    return [Document((Text(name * n), image)) for n, name in enumerate(tiny.CONCEPTS[:count], 1)]


def test_as_many_documents_are_selected_as_fit_the_positions(folder):
    query = Document((Text("cat"), Hole("image")))
    new_tokens = folder.tokenizer.image_tokens
    step = folder.config.part_step

    def used(retrieved: list[Document]) -> int:
        # The most relevant document is last.
        ids = folder.tokenizer.encode([*retrieved[::-1], query])
        return folder.tokenizer.vocabulary.extent(ids, step) + 1 + new_tokens

    retrieved = documents(6)
    for context in range(used([]), used(retrieved) + 1, 3):
        config = dataclasses.replace(folder.config, max_length=context)
        small = dataclasses.replace(folder, config=config)
        selected = context_limits.select_fitting(small, retrieved, query, new_tokens)
        assert selected[::-1] == retrieved[: len(selected)] and used(selected) <= context
        assert len(selected) == 6 or used(retrieved[: len(selected) + 1]) > context


def test_every_number_of_documents_that_could_fit_is_accepted(folder):
    """The limit is that of documents with one-token texts."""
    prompt, step = "cat", folder.config.part_step
    tokenizer, vocabulary = folder.tokenizer, folder.tokenizer.vocabulary
    query = tokenizer.encode(Document((Text(prompt), Hole("image"))))
    shortest = [vocabulary.text_start, vocabulary.break_id]
    shortest += [vocabulary.image_start] * tokenizer.image_tokens + [vocabulary.break_id]
    for count in (1, 2, 3):
        ids = [query[0], *shortest * count, *query[1:]]
        needed = vocabulary.extent(ids, step) + tokenizer.image_tokens
        enough = dataclasses.replace(
            folder, config=dataclasses.replace(folder.config, max_length=needed)
        )
        context_limits.check_prompt(enough, prompt, count)
        with pytest.raises(UserError, match=f"holds at most {count}"):
            context_limits.check_prompt(enough, prompt, count + 1)
