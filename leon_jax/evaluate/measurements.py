"""The demo's numbers, measured on documents that training never saw.

Every function takes documents of a held-out split, each (caption, picture with pixels and codes),
and retrieves from the training documents only.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
import PIL.Image

from leon_jax.documents import Document, Hole, Image, Text
from leon_jax.engine.engine import Engine
from leon_jax.engine.sampling_params import SamplingParams
from leon_jax.leon import GeneratedImage, Leon
from leon_jax.tokenizers.image import fit_image, to_pixels

# Sequences scored in one compiled call.
_SCORED_TOGETHER = 25


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """How well pictures survive the image tokenizer.

    Attributes:
      psnr_db: peak signal-to-noise ratio, 10 log10(255^2 / mean squared error), the mean over
        pictures of their own.
      codes_used: the share of the codebook that these pictures use, 0 to 1.
      pictures: (original, reconstruction), uint8[n, r, r, 3] each.
    """

    psnr_db: float
    codes_used: float
    pictures: tuple[np.ndarray, np.ndarray]


def reconstruct(leon: Leon, documents: Sequence[Document]) -> Reconstruction:
    """Encodes and decodes the documents' pictures."""
    tokenizer = leon.model.image_tokenizer
    codes = np.stack([document.codes for document in documents])
    originals = np.stack(
        [fit_image(document.pixels, tokenizer.resolution) for document in documents]
    )
    with jax.set_mesh(leon.model.mesh):
        rebuilt = to_pixels(tokenizer.decode(codes))
    errors = np.square(originals.astype(np.float64) - rebuilt).mean((1, 2, 3))
    psnr = 10 * np.log10(255**2 / np.maximum(errors, 1e-10))
    used = len(np.unique(codes)) / tokenizer.codes
    return Reconstruction(float(psnr.mean()), used, (originals, rebuilt))


def image_perplexity(leon: Leon, documents: Sequence[Document], num_docs: int) -> float:
    """Exp of the mean negative log-likelihood of a picture token, given the caption.

    Args:
      leon: the model.
      documents: (caption, picture with codes).
      num_docs: documents retrieved by the caption and read first.
    """
    tokenizer = leon.model.tokenizer
    sequences, weights = [], []
    for document, retrieved in zip(documents, _retrieved(leon, documents, num_docs), strict=True):
        ids = tokenizer.encode([*retrieved, document])
        weight = np.zeros(len(ids), np.float32)
        weight[-1 - tokenizer.image_tokens : -1] = 1
        sequences.append(ids)
        weights.append(weight)
    scores = _score(leon, sequences, weights)
    return float(np.exp(-scores.sum() / (len(documents) * tokenizer.image_tokens)))


def caption_ranks(
    leon: Leon, documents: Sequence[Document], num_docs: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Where each picture's own caption ranks among the captions of all of them.

    A caption's score for a picture is how likely `Leon.generate` is to draw that very picture for
    it, log p(picture | caption, documents retrieved by the caption): by Bayes' rule the posterior
    of the caption when all captions are equally likely beforehand.

    Args:
      leon: the model.
      documents: the candidates and the pictures at once.
      num_docs: documents retrieved by each *caption* and read first, the same for all pictures.

    Returns:
      int[n] ranks (0 is first) and the scores float32[picture, caption].
    """
    tokenizer = leon.model.tokenizer
    read = _retrieved(leon, documents, num_docs)
    scores = np.zeros((len(documents), len(documents)), np.float32)
    for column, (document, retrieved) in enumerate(zip(documents, read, strict=True)):
        sequences, weights = [], []
        for drawn in documents:
            shown = Document((Text(document.text), Image(codes=drawn.codes)))
            ids = tokenizer.encode([*retrieved, shown])
            weight = np.zeros(len(ids), np.float32)
            weight[-1 - tokenizer.image_tokens : -1] = 1
            sequences.append(ids)
            weights.append(weight)
        scores[:, column] = _score(leon, sequences, weights)
    own = np.diag(scores)[:, None]
    return (scores > own).sum(1), scores


def draw(
    leon: Leon,
    documents: Sequence[Document],
    num_docs: int,
    guidance: float,
    top_p: float | None = None,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[GeneratedImage]:
    """One picture for each document's caption, all in one batch."""
    params = SamplingParams.of(guidance=guidance, top_p=top_p, temperature=temperature)
    prompts = [Document((Text(document.text), Hole("image"))) for document in documents]
    retrieved = _retrieved(leon, documents, num_docs)
    done = leon.complete(
        prompts,
        retrieved=retrieved,
        seeds=[seed + row for row in range(len(documents))],
        params=params,
    )
    return [
        GeneratedImage(
            PIL.Image.fromarray(picture.pixels),
            document.text,
            seed + row,
            params,
            tuple(read),
            leon.name,
        )
        for row, (document, picture, read) in enumerate(
            zip(documents, done, retrieved, strict=True)
        )
    ]


def prompt_match(leon: Leon, generations: Sequence[GeneratedImage]) -> float:
    """The share of pictures whose own prompt scores highest among all prompts.

    The judge is the retrieval encoder: inner products of unit image and text embeddings.
    """
    with jax.set_mesh(leon.model.mesh):
        pictures = leon.model.encoder.embed_images([np.asarray(each.image) for each in generations])
        prompts = leon.model.encoder.embed_texts([each.prompt for each in generations])
    return float((np.argmax(pictures @ prompts.T, axis=1) == np.arange(len(generations))).mean())


def real_match(leon: Leon, documents: Sequence[Document]) -> float:
    """`prompt_match` of the real pictures: how far the judge can be trusted."""
    real = [
        GeneratedImage(
            PIL.Image.fromarray(document.pixels), document.text, 0, SamplingParams(), (), ""
        )
        for document in documents
    ]
    return prompt_match(leon, real)


def _retrieved(
    leon: Leon, documents: Sequence[Document], num_docs: int
) -> list[tuple[Document, ...]]:
    """What `Leon.generate` would read for each caption."""
    found = []
    for document in documents:
        prompt = Document((Text(document.text), Hole("image")))
        found.append(leon.retrieve_fitting(prompt, num_docs, leon.model.tokenizer.image_tokens))
    return found


def _score(
    leon: Leon, sequences: Sequence[np.ndarray], weights: Sequence[np.ndarray]
) -> np.ndarray:
    longest = max(map(len, sequences))
    # Multiples of 32 keep padding small and the number of compiled programs few.
    engine = Engine(
        leon.model.engine.decoder, leon.model.tokenizer.vocabulary, [-(-longest // 32) * 32]
    )
    scores = []
    for start in range(0, len(sequences), _SCORED_TOGETHER):
        stop = start + _SCORED_TOGETHER
        scores.append(engine.score(sequences[start:stop], weights[start:stop]))
    return np.concatenate(scores)
