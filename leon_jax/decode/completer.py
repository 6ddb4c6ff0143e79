"""Completing documents as people have them: with pixels, on the devices of a mesh."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from tqdm import tqdm

from leon_jax import sharding
from leon_jax.config import UserError
from leon_jax.decode.cache import CacheType
from leon_jax.decode.checkpoint import CAPTION_TOKENS, Checkpoint
from leon_jax.decode.complete import Draft, Request, completions, drafts
from leon_jax.decode.engine import Engine
from leon_jax.decode.guidance import make_guidance
from leon_jax.decode.sampling import make_sampler
from leon_jax.decode.strategy import Strategy
from leon_jax.documents import Document, Hole, Image, Text
from leon_jax.models.decoder import Decoder
from leon_jax.tokenizers.image import ImageTokenizer, to_pixels


class Completer:
    """A decoder with its tokenizers, and the mesh that they are on.

    Args:
      checkpoint: where they come from.
      decoder: the model.
      image_tokenizer: pixels to codes and back.
      mesh: None: the one that is set, or one over all devices.
      cache: what keys and values are kept in; see `Engine`.

    Raises:
      UserError: the decoder reads pictures of other codes.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        decoder: Decoder,
        image_tokenizer: ImageTokenizer,
        mesh: jax.sharding.Mesh | None = None,
        cache: CacheType = "compute",
    ):
        self.checkpoint = checkpoint
        self.image_tokenizer = image_tokenizer
        self.mesh = mesh or current_mesh()
        documents = checkpoint.documents
        self.engine = Engine(
            decoder, documents.vocabulary, text_tokens=documents.text.size, kept=cache
        )
        found = image_tokenizer.shape, image_tokenizer.codes
        if found != (expected := (documents.image_shape, documents.vocabulary.image_codes)):
            raise UserError(
                f"tokenizer.safetensors in {checkpoint.folder} makes pictures of {found[0]} codes "
                f"out of {found[1]}, but the decoder reads {expected[0]} out of {expected[1]}"
            )

    @property
    def decoder(self) -> Decoder:
        """The model; another one needs another `Completer`."""
        return self.engine.decoder

    def complete(
        self,
        documents: Document | Sequence[Document],
        *,
        retrieved: Sequence[Sequence[Document]] | None = None,
        seeds: Sequence[int] | None = None,
        guidance: float = 1.0,
        temperature: float = 1.0,
        top_p: float | None = None,
        top_k: int | None = None,
        max_tokens: int = CAPTION_TOKENS,
        strategy: Strategy | Sequence[Strategy] | None = None,
    ) -> list[Document]:
        """Fills every hole of every document.

        Args:
          documents: one, or several; pictures may come as pixels or as codes.
          retrieved: for each document, those to read first; by default none.
          seeds: for each document, 0..2**32 - 1; by default 0, 1, ... The result of a document
            depends on its own seed only.
          guidance: of picture holes.
          temperature, top_p, top_k: of all holes.
          max_tokens: where a text hole is cut.
          strategy: how ids are drawn, of all documents or of each, instead of what `guidance`,
            `temperature`, `top_p` and `top_k` say; half of the pictures of a prompt may be drawn in
            one way and half in another.

        Returns:
          Documents without holes; pictures that filled one hold pixels and codes.

        Raises:
          UserError: a document does not fit the context, or an argument is out of range; of several
            documents the message says which one. `complete_each` finishes the others.
        """
        documents = [documents] if isinstance(documents, Document) else list(documents)
        done: list = [None] * len(documents)
        bar = tqdm(total=len(done), unit="doc", disable=len(done) <= self.engine.rows, leave=False)
        requests = self._requests(
            documents, retrieved, seeds, max_tokens,
            strategy or make_strategy(guidance, temperature, top_p, top_k),
        )  # fmt: skip
        with bar:
            for number, result in self._completions(requests):
                if isinstance(result, UserError):
                    several = f"document {number}: " if len(done) > 1 else ""
                    raise UserError(f"{several}{result}") from result
                done[number] = result
                bar.update()
        return self._with_pixels(done)

    def complete_each(
        self,
        documents: Iterable[Document],
        *,
        retrieved: Sequence[Sequence[Document]] | None = None,
        seeds: Sequence[int] | None = None,
        guidance: float = 1.0,
        temperature: float = 1.0,
        top_p: float | None = None,
        top_k: int | None = None,
        max_tokens: int = CAPTION_TOKENS,
        strategy: Strategy | Sequence[Strategy] | None = None,
    ) -> Iterator[tuple[int, Document | UserError]]:
        """Fills every hole of every document; results come as they are done.

        Args: see `complete`.

        Returns:
          The place of a document, and what `complete` returns for it; or what is wrong with it,
          which keeps none of the others.

        Raises:
          UserError: an argument other than a document is out of range.
        """
        requests = self._requests(
            [documents] if isinstance(documents, Document) else list(documents),
            retrieved, seeds, max_tokens,
            strategy or make_strategy(guidance, temperature, top_p, top_k),
        )  # fmt: skip

        def results() -> Iterator[tuple[int, Document | UserError]]:
            for number, result in self._completions(requests):
                if not isinstance(result, UserError):
                    (result,) = self._with_pixels([result])
                yield number, result

        return results()

    def _requests(
        self,
        documents: Sequence[Document],
        retrieved: Sequence[Sequence[Document]] | None,
        seeds: Sequence[int] | None,
        max_tokens: int,
        strategy: Strategy | Sequence[Strategy],
    ) -> list[Request]:
        """What is asked for; see `complete`."""
        for document in documents:
            if not isinstance(document, Document):
                raise UserError(f"{document!r} is no Document; make one of Text, Image and Hole")
        count = len(documents)
        ways = [strategy] * count if isinstance(strategy, Strategy) else strategy
        strategies = _one_each("strategy", ways, count)
        seeds = _one_each("seeds", range(count) if seeds is None else seeds, count)
        read = _one_each("retrieved", [()] * count if retrieved is None else retrieved, count)
        if any(isinstance(each, Document) for each in read):
            raise UserError("retrieved: a document; give a sequence of documents for each document")
        for drawn, seed in zip(strategies, seeds, strict=True):
            drawn.check()
            check_seeds(seed)
        if max_tokens < 1:
            raise UserError(f"max_tokens is {max_tokens}; it must be at least 1")
        return [
            Request(
                self.tokenize(document), tuple(map(self.tokenize, first)), int(seed), drawn,
                max_tokens,
            )
            for document, first, seed, drawn in zip(documents, read, seeds, strategies, strict=True)
        ]  # fmt: skip

    def _completions(
        self, requests: Sequence[Request]
    ) -> Iterator[tuple[int, Document | UserError]]:
        """The place of each request and its document, or what is wrong with it."""
        return self._on_mesh(completions(self.engine, self.checkpoint.documents, requests))

    def stream(
        self,
        document: Document,
        *,
        retrieved: Sequence[Document] = (),
        seed: int = 0,
        guidance: float = 1.0,
        temperature: float = 1.0,
        top_p: float | None = None,
        top_k: int | None = None,
        max_tokens: int = CAPTION_TOKENS,
        strategy: Strategy | None = None,
    ) -> Iterator[Draft]:
        """Fills the holes of a document and shows it growing.

        After each row of a picture's tokens (and as many tokens of a text) comes what there is:
        texts as far as they are written, and pictures with pixels, white where nothing is drawn
        yet. The last draft is `done` and equals what `complete` returns.

        Args: see `complete`.

        Raises:
          UserError: see `complete`.
        """
        (request,) = self._requests(
            [document], [tuple(retrieved)], [seed], max_tokens,
            strategy or make_strategy(guidance, temperature, top_p, top_k),
        )  # fmt: skip
        documents = self.checkpoint.documents
        rows, columns = documents.image_shape
        for draft in self._on_mesh(drafts(self.engine, documents, request, columns)):
            (shown,) = self._with_pixels([draft.document])
            if draft.place is not None:
                picture = shown.parts[draft.place]
                assert isinstance(picture, Image) and picture.pixels is not None
                pixels = picture.pixels.copy()
                pixels[draft.drawn // columns * len(pixels) // rows :] = 255
                shown = shown.replace(draft.place, Image(pixels, picture.codes))
            yield dataclasses.replace(draft, document=shown)

    def likelihood(
        self, document: Document, part: int | None = None, retrieved: Sequence[Document] = ()
    ) -> float:
        """Log-likelihood in nats of a document without holes, or of one part given the others.

        Args:
          document: pictures may come as pixels or as codes.
          part: position of a part: it is scored as the answer to the document with a hole in its
            place, its end included, which ranks captions for a picture. None: all ids in order.
          retrieved: documents to read first; they are not scored.

        Raises:
          UserError: the document has holes, or does not fit the context.
        """
        ids, weights = self._scored(document, part, retrieved)
        with jax.set_mesh(self.mesh):
            return float(self.engine.score([ids], [weights])[0])

    def _scored(
        self, document: Document, part: int | None, retrieved: Sequence[Document] = ()
    ) -> tuple[np.ndarray, np.ndarray]:
        """The ids whose likelihood is asked for, and which of them count; see `likelihood`."""
        tokenizer = self.checkpoint.documents
        document, retrieved = self.tokenize(document), [*map(self.tokenize, retrieved)]
        if document.holes:
            raise UserError("a likelihood needs a document without holes")
        if part is None:
            ids = tokenizer.encode([*retrieved, document])
            scored = len(tokenizer.encode(document)) - 1
        else:
            answered = document.parts[part]
            hole = Hole("text" if isinstance(answered, Text) else "image")
            question = [*retrieved, document.replace(part, hole)]
            answer = tokenizer.answer(question, [answered])
            ids = np.concatenate([tokenizer.prompt(question), answer])
            scored = len(answer)
        weights = np.zeros(len(ids), np.float32)
        weights[-scored:] = 1
        return ids, weights

    def tokenize(self, document: Document) -> Document:
        """The document with codes beside the pixels of every picture."""
        for place, part in enumerate(document.parts):
            if isinstance(part, Image) and part.codes is None and part.pixels is not None:
                pixels = self.image_tokenizer.preprocess(part.pixels)
                with jax.set_mesh(self.mesh):
                    codes = self.image_tokenizer.encode(pixels[None])[0]
                document = document.replace(place, Image(part.pixels, np.asarray(codes, np.int32)))
        return document

    def _on_mesh[Item](self, items: Iterator[Item]) -> Iterator[Item]:
        """The same items, made under the mesh; whoever takes them is not under it."""
        while True:
            with jax.set_mesh(self.mesh):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    def _with_pixels(self, documents: list[Document]) -> list[Document]:
        """Decodes the pictures that have codes only."""
        places = [
            (row, place, part.codes)
            for row, document in enumerate(documents)
            for place, part in enumerate(document.parts)
            if isinstance(part, Image) and part.pixels is None and part.codes is not None
        ]
        if places:
            with jax.set_mesh(self.mesh):
                codes = np.stack([codes for _, _, codes in places])
                decoded = to_pixels(self.image_tokenizer.decode(codes))
            for (row, place, codes), pixels in zip(places, decoded, strict=True):
                documents[row] = documents[row].replace(place, Image(pixels, codes))
        return documents


def _one_each[Item](name: str, given: Iterable[Item], count: int) -> list[Item]:
    """As a list.

    Raises:
      UserError: there is not one for each document.
    """
    listed = list(given) if isinstance(given, Iterable) else None
    if listed is None or len(listed) != count:
        found = given if listed is None else len(listed)
        raise UserError(f"{name}: {found} for {count} documents; give one for each")
    return listed


def make_strategy(
    guidance: float, temperature: float, top_p: float | None, top_k: int | None
) -> Strategy:
    """One guidance for pictures, and one sampler for pictures and texts.

    Raises:
      UserError: see `make_guidance` and `make_sampler`.
    """
    sampler = make_sampler(temperature, top_p, top_k)
    return Strategy(make_guidance(guidance), sampler, sampler)


def check_seeds(seed: int, count: int = 1) -> None:
    """Checks the seeds from `seed` on.

    Raises:
      UserError: one of them is no number of 32 bits.
    """
    if not 0 <= seed <= 2**32 - count:
        raise UserError(f"seed is {seed}; it must be from 0 to {2**32 - count}")


def current_mesh() -> jax.sharding.Mesh:
    """The mesh that is set, or one over all devices."""
    current = jax.sharding.get_mesh()
    return sharding.make_mesh() if current.empty else current
