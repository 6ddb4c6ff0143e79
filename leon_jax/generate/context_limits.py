"""Checks whether prompts, captions and retrieved documents fit the context of a model."""

from collections.abc import Sequence

import numpy as np

from leon_jax.config import UserError
from leon_jax.documents import Document, Hole, Text
from leon_jax.model_folder import ModelFolder


def check_prompt(folder: ModelFolder, prompt: str, num_docs: int) -> None:
    """Checks a prompt for an image, and the number of retrieved documents.

    Raises:
      UserError: the prompt is empty, too long or has a lone surrogate, `num_docs` is negative, or
        the documents cannot fit the context.
    """
    if not prompt.strip():
        raise UserError("the prompt is empty; say what the image should show")
    try:
        document = Document((Text(prompt), Hole("image")))
    except ValueError as error:
        raise UserError(f"the prompt cannot be read: {error}") from error
    used = folder.extent(folder.tokenizer.encode(document)) + folder.tokenizer.image_tokens
    if used > folder.context:
        tokens = len(folder.tokenizer.text.encode(prompt))
        raise UserError(
            f"the prompt has {len(prompt)} characters or {tokens} tokens; with the image "
            f"there is room for {tokens + folder.context - used} tokens, so make it shorter"
        )
    _check_documents(folder, num_docs, folder.docs_beside(used))


def check_caption(folder: ModelFolder, max_tokens: int, num_docs: int) -> None:
    """Checks the length limit of a caption, and the number of retrieved documents.

    Raises:
      UserError: `max_tokens` is below 1, `num_docs` is negative, the model writes no captions, or
        the context is too short for an image with a caption of `max_tokens` tokens and `num_docs`
        documents.
    """
    if max_tokens < 1:
        raise UserError(f"max_tokens is {max_tokens}; a caption has at least 1 token")
    used = _caption_extent(folder) + max_tokens
    if used > folder.context:
        raise UserError(
            f"max_tokens is {max_tokens}; with an image there is room for "
            f"{max_tokens + folder.context - used}"
        )
    _check_documents(folder, num_docs, folder.docs_beside(used))


def fitting_docs(folder: ModelFolder, max_tokens: int) -> int:
    """Returns the number of documents that fit beside an image and a caption of `max_tokens`.

    Raises:
      UserError: the model writes no captions.
    """
    return max(0, folder.docs_beside(_caption_extent(folder) + max_tokens))


def check_num_docs(folder: ModelFolder, num_docs: int) -> None:
    """Checks the number of retrieved documents for image generation, before the prompt is known.

    Raises:
      UserError: `num_docs` is negative, or the documents cannot fit even with the shortest prompt.
    """
    _check_documents(folder, num_docs, folder.max_docs)


def _check_documents(folder: ModelFolder, num_docs: int, limit: int) -> None:
    if num_docs < 0:
        raise UserError(f"num_docs is {num_docs}; it must be 0 or more")
    folder.tokenizer.check_task(Document((Hole("image"),)), num_docs)
    if num_docs and limit < 1:
        raise UserError(
            f"num_docs is {num_docs}, but a context of {folder.context} tokens holds no retrieved "
            f"document beside an image of {folder.tokenizer.image_tokens} tokens and this request; "
            "use 0"
        )
    if num_docs > limit:
        raise UserError(
            f"num_docs is {num_docs}; the model's context of {folder.context} positions holds "
            f"at most {limit} documents with this request; use fewer, or shorten the request"
        )


def select_fitting(
    folder: ModelFolder, retrieved: Sequence[Document], query: Document, new_tokens: int
) -> list[Document]:
    """Returns the retrieved documents that fit the context with the query, in sequence order.

    The most relevant document is last, next to the query. The least relevant documents are
    dropped first.

    Args:
      folder: the model folder.
      retrieved: retrieved documents, most relevant first.
      query: a document with a hole.
      new_tokens: number of tokens to generate.
    """
    fitting = list(retrieved)
    while fitting:
        # One more position, because a query that is not open is followed by a sentinel.
        used = folder.extent(folder.tokenizer.encode([*fitting[::-1], query])) + 1
        if used + new_tokens <= folder.context:
            break
        fitting.pop()
    return fitting[::-1]


def _caption_extent(folder: ModelFolder) -> int:
    """Returns the positions of an image with a hole for its caption, without the caption.

    Raises:
      UserError: the model writes no captions.
    """
    folder.tokenizer.check_task(Document((Hole("text"), Hole("image"))))
    vocabulary = folder.tokenizer.vocabulary
    image = [vocabulary.image_start] * folder.tokenizer.image_tokens
    prefix = [vocabulary.eos, vocabulary.sentinel(0), vocabulary.break_id, *image]
    return folder.extent(np.array([*prefix, vocabulary.eos, vocabulary.sentinel(0)]))
