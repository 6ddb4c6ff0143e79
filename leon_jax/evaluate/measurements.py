"""Computes metrics of a model on held-out documents.

Every function takes documents of a held-out split, each a caption and an image with pixels and
codes, and retrieves only from the training documents.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import numpy as np
import PIL.Image
from jaxtyping import Bool, Float64, UInt8

from leon_jax.documents import Document, Hole, Image, Text
from leon_jax.engine.engine import Engine
from leon_jax.engine.likelihood import log_likelihoods
from leon_jax.engine.sampling_params import SamplingParams
from leon_jax.leon import GeneratedImage, Leon
from leon_jax.tokenizers.image import fit_image, to_pixels

# Sequences scored in one compiled call.
_SCORE_BATCH = 25


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """Reconstructions of the image tokenizer and their quality.

    Attributes:
      psnr_db: peak signal-to-noise ratio, 10 log10(255^2 / mean squared error); mean over images.
      codes_used: share of the codebook that these images use, 0 to 1.
      images: (originals, reconstructions), uint8[n, r, r, 3] each.
    """

    psnr_db: float
    codes_used: float
    images: tuple[np.ndarray, np.ndarray]


def reconstruct(leon: Leon, documents: Sequence[Document]) -> Reconstruction:
    """Decodes the documents' image codes and compares the results with the original images."""
    tokenizer = leon.model.image_tokenizer
    codes = np.stack([document.codes for document in documents])
    originals = np.stack(
        [fit_image(document.pixels, tokenizer.resolution) for document in documents]
    )
    with jax.set_mesh(leon.model.mesh):
        reconstructions = to_pixels(tokenizer.decode(codes))
    errors = np.square(originals.astype(np.float64) - reconstructions).mean((1, 2, 3))
    psnr = 10 * np.log10(255**2 / np.maximum(errors, 1e-10))
    codes_used = len(np.unique(codes)) / tokenizer.codes
    return Reconstruction(float(psnr.mean()), codes_used, (originals, reconstructions))


def image_losses(
    leon: Leon, documents: Sequence[Document], num_docs: int
) -> Float64[np.ndarray, "n"]:
    """Returns the negative log-likelihood of each document's image, in nats per image token.

    The exponential of the mean is the perplexity.

    Args:
      leon: the model.
      documents: documents with a caption and image codes.
      num_docs: number of documents retrieved by the caption and put before it.
    """
    tokenizer = leon.model.tokenizer
    sequences, weights = [], []
    for document, retrieved in zip(documents, _retrieved(leon, documents, num_docs), strict=True):
        ids = tokenizer.encode([*retrieved, document])
        weight = np.zeros(len(ids), np.float32)
        weight[-1 - tokenizer.image_tokens : -1] = 1
        sequences.append(ids)
        weights.append(weight)
    return -_score(leon, sequences, weights).astype(np.float64) / tokenizer.image_tokens


def retrieval_gains(losses: Sequence[Float64[np.ndarray, "n"]]) -> tuple[list[float], list[float]]:
    """Returns how much each further retrieved document lowers the loss of the same images.

    Args:
      losses: `image_losses` with 0, 1, 2, ... retrieved documents.

    Returns:
      The mean difference to the losses with one document less, for 1, 2, ... documents, in nats per
      token, and its standard error over images.
    """
    differences = [before - after for before, after in itertools.pairwise(losses)]
    errors = [gain.std(ddof=1) / np.sqrt(len(gain)) for gain in differences]
    return [float(gain.mean()) for gain in differences], [float(error) for error in errors]


def caption_ranks(
    leon: Leon, documents: Sequence[Document], num_docs: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks all captions for each image by the likelihood of the image given the caption.

    The score of a caption for an image is log p(image | caption, documents retrieved by the
    caption), the model's log-likelihood of the image's tokens. By Bayes' rule this is the log
    posterior of the caption, up to a constant, if all captions have the same prior.

    Args:
      leon: the model.
      documents: their captions are the candidates for each of their images.
      num_docs: number of documents retrieved by each caption and put before it, whatever the image.

    Returns:
      int[n], the rank of each image's own caption (0 is first), and the scores
      float32[image, caption].
    """
    tokenizer = leon.model.tokenizer
    contexts = _retrieved(leon, documents, num_docs)
    scores = np.zeros((len(documents), len(documents)), np.float32)
    for column, (document, retrieved) in enumerate(zip(documents, contexts, strict=True)):
        sequences, weights = [], []
        for candidate in documents:
            pair = Document((Text(document.text), Image(codes=candidate.codes)))
            ids = tokenizer.encode([*retrieved, pair])
            weight = np.zeros(len(ids), np.float32)
            weight[-1 - tokenizer.image_tokens : -1] = 1
            sequences.append(ids)
            weights.append(weight)
        scores[:, column] = _score(leon, sequences, weights)
    own_scores = np.diag(scores)[:, None]
    return (scores > own_scores).sum(1), scores


def captions(leon: Leon, documents: Sequence[Document]) -> list[str]:
    """Returns the most likely caption of each document's image, token by token, for all at once."""
    prompts = [Document((Hole("text"), Image(codes=document.codes))) for document in documents]
    params = SamplingParams.of(temperature=0.0)
    return [document.text for document in leon.complete(prompts, params=params)]


def caption_matches(
    texts: Sequence[str], documents: Sequence[Document]
) -> tuple[Bool[np.ndarray, "n"], Bool[np.ndarray, "n"]]:
    """Compares generated captions with the captions of the documents.

    Case and spaces at the ends do not count. A text names the right concept if it is the caption of
    the document or one of its alternative captions (`Provenance.captions`), with or without the
    part after the last comma, which may name a style.

    Args:
      texts: a generated caption for the image of each document.
      documents: documents with captions.

    Returns:
      Which texts equal the caption, and which name the right concept.
    """
    exact, right = [], []
    for text, document in zip(texts, documents, strict=True):
        others = document.provenance.captions if document.provenance else ()
        names = {name for caption in (document.text, *others) for name in _names(caption)}
        exact.append(_plain(text) == _plain(document.text))
        right.append(not names.isdisjoint(_names(text)))
    return np.array(exact), np.array(right)


def _plain(text: str) -> str:
    return text.strip().casefold()


def _names(caption: str) -> tuple[str, str]:
    """Returns a caption, and the caption without the part after the last comma."""
    return _plain(caption), _plain(caption.rpartition(",")[0] or caption)


def generate(
    leon: Leon,
    documents: Sequence[Document],
    num_docs: int,
    guidance: float | None = None,
    top_p: float | None = None,
    temperature: float | None = None,
    seed: int = 0,
) -> list[GeneratedImage]:
    """Generates one image for each document's caption, all in one batch.

    Args:
      leon: the model.
      documents: their captions are the prompts.
      num_docs: number of documents retrieved by each caption and put before it.
      guidance: classifier-free guidance weight; None: the model's.
      top_p: nucleus sampling probability, above 0 to 1; None: the model's.
      temperature: sampling temperature; None: the model's.
      seed: seed of the first image; each further image adds 1.
    """
    params = leon.model.folder.defaults.sampling.replace(
        guidance=guidance, top_p=top_p, temperature=temperature
    )
    prompts = [Document((Text(document.text), Hole("image"))) for document in documents]
    retrieved = _retrieved(leon, documents, num_docs)
    images = leon.complete(
        prompts,
        retrieved=retrieved,
        seeds=[seed + row for row in range(len(documents))],
        params=params,
    )
    return [
        GeneratedImage(
            PIL.Image.fromarray(image.pixels),
            document.text,
            seed + row,
            params,
            tuple(context),
            leon.name,
        )
        for row, (document, image, context) in enumerate(
            zip(documents, images, retrieved, strict=True)
        )
    ]


def copies(leon: Leon, documents: Sequence[Document]) -> list[UInt8[np.ndarray, "r r 3"]]:
    """Returns the image that each caption retrieves first, at the side of generated images.

    It is the answer of a model that only copies. It is white if a caption retrieves nothing.
    """
    side = leon.model.image_tokenizer.resolution
    white = np.full((side, side, 3), 255, np.uint8)
    return [
        fit_image(retrieved[-1].pixels, side) if retrieved else white
        for retrieved in _retrieved(leon, documents, 1)
    ]


def prompt_match(leon: Leon, generations: Sequence[GeneratedImage]) -> float:
    """Returns the share of images whose own prompt scores highest among all prompts, 0 to 1.

    The score is the retrieval encoder's inner product of unit image and text embeddings.
    """
    encoder = leon.model.retrieval_encoder
    with jax.set_mesh(leon.model.mesh):
        images = encoder.embed_images([np.asarray(generation.image) for generation in generations])
        prompts = encoder.embed_texts([generation.prompt for generation in generations])
    return float((np.argmax(images @ prompts.T, axis=1) == np.arange(len(generations))).mean())


def real_match(leon: Leon, documents: Sequence[Document]) -> float:
    """Returns `prompt_match` of the real images, an estimate of its ceiling."""
    real_images = [
        GeneratedImage(
            PIL.Image.fromarray(document.pixels), document.text, 0, SamplingParams(), (), ""
        )
        for document in documents
    ]
    return prompt_match(leon, real_images)


def _retrieved(
    leon: Leon, documents: Sequence[Document], num_docs: int
) -> list[tuple[Document, ...]]:
    """Returns the documents that `Leon.generate` would retrieve for each caption."""
    retrieved = []
    for document in documents:
        prompt = Document((Text(document.text), Hole("image")))
        retrieved.append(leon.retrieve_fitting(prompt, num_docs, leon.model.tokenizer.image_tokens))
    return retrieved


def _score(
    leon: Leon, sequences: Sequence[np.ndarray], weights: Sequence[np.ndarray]
) -> np.ndarray:
    max_length = max(map(len, sequences))
    # Multiples of 32 need little padding and few compiled programs.
    engine = Engine(
        leon.model.engine.decoder, leon.model.tokenizer.vocabulary, [-(-max_length // 32) * 32]
    )
    scores = []
    for start in range(0, len(sequences), _SCORE_BATCH):
        stop = start + _SCORE_BATCH
        scores.append(log_likelihoods(engine, sequences[start:stop], weights[start:stop]))
    return np.concatenate(scores)
