"""Generates images: converts prompts to requests, and completed requests to ranked images."""

from collections.abc import Callable

import jax
import numpy as np
import PIL.Image

from leon_jax.config import UserError
from leon_jax.documents import Document, Hole, Image, Text
from leon_jax.engine import likelihood
from leon_jax.engine.scheduler import Scheduler
from leon_jax.generate import context_limits, ranking
from leon_jax.generate.completion import Completion
from leon_jax.generate.image_metadata import settings_text
from leon_jax.generate.image_settings import ImageSettings
from leon_jax.generate.inputs import text_part
from leon_jax.generate.model import Model
from leon_jax.generate.prompt_builder import PromptBuilder, Request
from leon_jax.generate.results import GeneratedImage

# Maps (prompt, maximum number of documents, number of new tokens) to retrieved documents.
Retrieve = Callable[[Document, int, int], tuple[Document, ...]]


def image_request(
    model: Model, retrieve: Retrieve, prompt: str, settings: ImageSettings
) -> Request | UserError:
    """Returns the request for a prompt's images, or the error that prevents it.

    Args:
      model: the loaded model.
      retrieve: retrieves documents that fit the context.
      prompt: the prompt.
      settings: the settings of the images, filled (see `ImageSettings.filled`).
    """
    tokenizer = model.tokenizer
    try:
        text = text_part("prompt", prompt)
        context_limits.check_prompt(model.folder, text.text, settings.max_docs)
        document = Document((text, Hole("image")))
        if settings.best_of is not None and settings.rank_by == "likelihood":
            # The prompt will be scored as a caption, which needs more tokens than generation.
            blank = Image(codes=np.zeros(tokenizer.image_shape, int))
            ids, _ = ranking.scored_ids(tokenizer, document.replace(1, blank), 0)
            likelihood.check_sequence(model.engine, ids)
        elif settings.best_of is not None:
            _ = model.retrieval_encoder
        retrieved = retrieve(document, settings.max_docs, tokenizer.image_tokens)
    except UserError as error:
        return error
    return Request(document, retrieved, settings.samples)


def finished_images(
    model: Model,
    completion: Completion,
    settings: ImageSettings,
    prompt: str | None = None,
    task: str = "generate",
) -> list[GeneratedImage]:
    """Returns the images of a completed request: the last part of each document.

    Args:
      model: the model that generated them.
      completion: the completion of the request.
      settings: the settings of the images.
      prompt: the prompt for ranking and metadata; None: the text of the request's document.
      task: the task for the metadata; see `settings_text`.

    Returns:
      All images in the order of the samples or, with `settings.best_of`, the best `num_images` of
      them, best first.

    Raises:
      UserError: the request failed.
    """
    if completion.error:
        raise completion.error
    request, images = completion.request, []
    assert request is not None
    prompt = request.document.text if prompt is None else prompt
    documents = model.decode_images(completion.documents)
    for document, sample in zip(documents, request.samples, strict=True):
        image = document.parts[-1]
        assert isinstance(image, Image) and image.pixels is not None
        images.append(
            GeneratedImage(
                PIL.Image.fromarray(image.pixels), prompt, sample.seed, sample.params,
                request.retrieved, model.folder.name,
                settings_text(
                    sample.params, model.state, settings.max_docs, settings.best_of,
                    settings.rank_by, task,
                ),
            )
        )  # fmt: skip
    if settings.best_of is None:
        return images
    with jax.set_mesh(model.mesh):
        if settings.rank_by == "likelihood":
            rows = [ranking.scored_ids(model.tokenizer, document, 0) for document in documents]
            scores = likelihood.log_likelihoods(
                model.engine, [ids for ids, _ in rows], [weights for _, weights in rows]
            )
        else:
            pixels = [np.asarray(each.image) for each in images]
            words = model.tokenizer.words(prompt)
            scores = ranking.clip_scores(model.retrieval_encoder, words, pixels)
    return [images[index] for index in ranking.best(scores, settings.num_images)]


def warm_up(model: Model, settings: ImageSettings, prompts: int) -> int:
    """Compiles the programs that generate images for prompts of any length.

    Args:
      model: the loaded model.
      settings: the settings of the images.
      prompts: the number of prompts, which the batch sizes depend on.

    Returns:
      The number of padded prompt lengths.

    Raises:
      UserError: `prompts` is below 1, or the images do not fit the context.
    """
    if prompts < 1:
        raise UserError(f"prompts is {prompts}; it must be at least 1")
    text = Text(model.tokenizer.text.decode([0]))
    request = Request(Document((text, Hole("image"))), samples=settings.samples)
    with jax.set_mesh(model.mesh):
        codes = np.zeros((len(settings.samples), *model.tokenizer.image_shape), np.int32)
        model.image_tokenizer.decode(codes)
    token_request = PromptBuilder(model.tokenizer, request).build()
    return Scheduler(model.engine).warm([token_request] * prompts)
