"""Completing documents as people have them: with pixels, on the devices of a mesh."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from tqdm import tqdm

from leon_jax import sharding
from leon_jax.config import UserError
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

    Raises:
      UserError: the decoder reads pictures of another number of codes.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        decoder: Decoder,
        image_tokenizer: ImageTokenizer,
        mesh: jax.sharding.Mesh | None = None,
    ):
        self.checkpoint, self.decoder = checkpoint, decoder
        self.image_tokenizer = image_tokenizer
        self.mesh = mesh or current_mesh()
        documents = checkpoint.documents
        self.engine = Engine(decoder, documents.vocabulary, text_tokens=documents.text.size)
        if image_tokenizer.shape != documents.image_shape:
            raise UserError(
                f"tokenizer.safetensors in {checkpoint.folder} makes {image_tokenizer.shape} codes "
                f"a picture, but the decoder reads {documents.image_shape}"
            )

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
          seeds: for each document; by default 0, 1, ... The result of a document depends on its
            own seed only.
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
            documents the message says which one.
        """
        documents = [documents] if isinstance(documents, Document) else list(documents)
        seeds = list(range(len(documents))) if seeds is None else list(seeds)
        if any(seed < 0 for seed in seeds):
            raise UserError(f"seed is {min(seeds)}; it must be 0 or more")
        if strategy is None:
            sampler = make_sampler(temperature, top_p, top_k)
            strategy = Strategy(make_guidance(guidance), sampler, sampler)
        if isinstance(strategy, Strategy):
            strategy = [strategy] * len(documents)
        read = [()] * len(documents) if retrieved is None else [tuple(each) for each in retrieved]
        requests = [
            Request(self.tokenize(document), documents_read, seed, drawn, max_tokens)
            for document, documents_read, seed, drawn in zip(
                documents, read, seeds, strategy, strict=True
            )
        ]
        done: list = [None] * len(requests)
        bar = tqdm(total=len(done), unit="doc", disable=len(done) <= self.engine.rows, leave=False)
        with jax.set_mesh(self.mesh), bar:
            for number, result in completions(self.engine, self.checkpoint.documents, requests):
                if isinstance(result, UserError):
                    several = f"document {number}: " if len(requests) > 1 else ""
                    raise UserError(f"{several}{result}") from result
                done[number] = result
                bar.update()
            return self._with_pixels(done)

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
    ) -> Iterator[Draft]:
        """Fills the holes of a document and shows it growing.

        After each row of a picture's tokens (and as many tokens of a text) comes what there is:
        texts as far as they are written, and pictures with pixels, white where nothing is drawn
        yet. The last draft is `done` and equals what `complete` returns.

        Args: see `complete`.

        Raises:
          UserError: see `complete`.
        """
        if seed < 0:
            raise UserError(f"seed is {seed}; it must be 0 or more")
        sampler = make_sampler(temperature, top_p, top_k)
        strategy = Strategy(make_guidance(guidance), sampler, sampler)
        request = Request(self.tokenize(document), tuple(retrieved), seed, strategy, max_tokens)
        documents = self.checkpoint.documents
        rows, columns = documents.image_shape
        for draft in self._on_mesh(drafts(self.engine, documents, request, columns)):
            with jax.set_mesh(self.mesh):
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
        tokenizer = self.checkpoint.documents
        document = self.tokenize(document)
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
        with jax.set_mesh(self.mesh):
            return float(self.engine.score([ids], [weights])[0])

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
            decoded = to_pixels(self.image_tokenizer.decode(np.stack([c for _, _, c in places])))
            for (row, place, codes), pixels in zip(places, decoded, strict=True):
                documents[row] = documents[row].replace(place, Image(pixels, codes))
        return documents


def current_mesh() -> jax.sharding.Mesh:
    """The mesh that is set, or one over all devices."""
    current = jax.sharding.get_mesh()
    return sharding.make_mesh() if current.empty else current
