"""Completing documents: every hole of every request filled, through the engine.

A hole at the end of a document is continued causally; holes before the end are infilled, in order,
behind the whole document. Requests whose next holes are of one kind run as one batch.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from leon_jax.data.examples import join
from leon_jax.decode.engine import Answer, Engine, Prompt
from leon_jax.decode.grammar import ImageSpan, Span, TextSpan
from leon_jax.decode.guidance import Guidance, Plain
from leon_jax.decode.sampling import Categorical, Sampler
from leon_jax.documents import Document, Hole, Text
from leon_jax.tokenizers.documents import DocumentTokenizer


@dataclasses.dataclass(frozen=True)
class Request:
    """A document with holes, what it may read first, and the seed of its draws.

    Pictures need codes.
    """

    document: Document
    retrieved: tuple[Document, ...] = ()
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Settings:
    """How holes are filled.

    Attributes:
      guidance: of picture holes. Stream 1, where it reads one, is the document with every text
        masked and nothing retrieved, so what guidance strengthens is what text and retrieved
        documents say together. Text holes are always filled without guidance.
      image_sampler, text_sampler: how an id is drawn.
      text_limit: most tokens of a text hole.
    """

    guidance: Guidance = dataclasses.field(default_factory=Plain)
    image_sampler: Sampler = dataclasses.field(default_factory=Categorical)
    text_sampler: Sampler = dataclasses.field(default_factory=Categorical)
    text_limit: int = 64


def complete(
    engine: Engine,
    tokenizer: DocumentTokenizer,
    requests: Sequence[Request],
    settings: Settings | None = None,
) -> list[Document]:
    """Fills all holes; a request's result does not depend on the other requests.

    Returns:
      One document a request, without holes; new pictures hold codes only.

    Raises:
      UserError: a prompt and its answer do not fit the context, or a document cannot be encoded.
    """
    settings = settings or Settings()
    rows = [_Row(tokenizer, request) for request in requests]
    while waiting := [row for row in rows if row.hole is not None]:
        groups: dict[Span, list[_Row]] = {}
        for row in waiting:
            groups.setdefault(row.span(settings.text_limit), []).append(row)
        for span, group in groups.items():
            image = isinstance(span, ImageSpan)
            guidance = settings.guidance if image else Plain()
            sampler = settings.image_sampler if image else settings.text_sampler
            prompts = [row.prompt(guidance.streams) for row in group]
            for row, answer in zip(
                group, engine.fill(prompts, span, guidance, sampler), strict=True
            ):
                row.accept(answer)
    return [row.document for row in rows]


class _Row:
    """One request on its way."""

    def __init__(self, tokenizer: DocumentTokenizer, request: Request):
        self.tokenizer, self.request = tokenizer, request
        self.document = request.document
        # The infills so far, each with its <eoss>; and how many holes have been filled in all.
        self.infills: list[np.ndarray] = []
        self.filled = 0

    @property
    def hole(self) -> int | None:
        """The position in `parts` of the hole to be filled next."""
        if not self.document.holes:
            return None
        return self.document.holes[-1 if self.open else len(self.infills)]

    @property
    def open(self) -> bool:
        """Whether the next hole is continued causally."""
        return isinstance(self.document.parts[-1], Hole)

    def span(self, text_limit: int) -> Span:
        """The grammar of the next hole."""
        vocabulary, tokens = self.tokenizer.vocabulary, self.tokenizer.text.size
        hole = None if self.hole is None else self.document.parts[self.hole]
        assert isinstance(hole, Hole)
        if hole.modality == "image":
            return ImageSpan(self.tokenizer.image_tokens)
        make = TextSpan.causal if self.open else TextSpan.infill
        return make(vocabulary, text_limit, tokens)

    def prompt(self, streams: int) -> Prompt:
        """The streams of the next hole."""
        sequences = [self._ids(self.document, self.infills, self.request.retrieved)]
        if streams > 1:
            parts = [Hole("text") if isinstance(p, Text) else p for p in self.document.parts]
            sequences.append(self._ids(Document(tuple(parts)), [], ()))
        # Each hole draws from a stream of random numbers of its own.
        seed = (self.request.seed + 0x9E3779B9 * self.filled) % 2**32
        return Prompt(tuple(sequences), seed)

    def accept(self, answer: Answer) -> None:
        """Takes the content of the next hole."""
        self.filled += 1
        if self.open:
            self.document = self.tokenizer.fill(self.document, answer.ids)
            return
        end = np.int32(self.tokenizer.vocabulary.eoss)
        self.infills.append(np.append(answer.ids, end))
        if len(self.infills) == len(self.document.holes):
            vocabulary = self.tokenizer.vocabulary
            written = [self.infills[0]]
            for index, infill in enumerate(self.infills[1:], start=1):
                written += [np.array([vocabulary.sentinel(index)], np.int32), infill]
            self.document = self.tokenizer.fill(self.document, np.concatenate(written))

    def _ids(
        self, document: Document, infills: list[np.ndarray], retrieved: Sequence[Document]
    ) -> np.ndarray:
        """Retrieved documents and the document; then, unless open, the tail up to the next hole."""
        vocabulary, encode = self.tokenizer.vocabulary, self.tokenizer.encode
        ids = [join(encode(document), [encode(each) for each in retrieved], vocabulary).ids]
        if self.open:
            return ids[0]
        for index, infill in enumerate(infills):
            ids += [np.array([vocabulary.sentinel(index)], np.int32), infill]
        number = document.holes.index(self.hole)
        return np.concatenate([*ids, np.array([vocabulary.sentinel(number)], np.int32)])
