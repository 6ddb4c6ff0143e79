"""From a document with holes to the engine's request, and from what was generated to a document.

A hole at the end of a document is continued causally. Holes before the end are infilled, in order,
after the whole document. One request fills all holes: its grammar says what may be generated for
each of them, and forces the marks between them.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from leon_jax.config import UserError
from leon_jax.documents import Document, Hole, Image, Part, Text
from leon_jax.engine.engine import Sample, TokenRequest
from leon_jax.engine.grammar import Forced, ImageSpan, Span, SpanOutput, TextSpan
from leon_jax.engine.guidance import Condition, Plain
from leon_jax.tokenizers.documents import DocumentTokenizer


@dataclasses.dataclass(frozen=True)
class Request:
    """A document with holes, the documents to read first, and its samples.

    Images need codes.

    Attributes:
      document: its holes are filled.
      retrieved: documents without holes, in the order in which they are read.
      samples: one for each result. Their `max_tokens` must be equal. Guidance applies to image
        holes; texts are generated without.
    """

    document: Document
    retrieved: tuple[Document, ...] = ()
    samples: tuple[Sample, ...] = (Sample(),)


@dataclasses.dataclass(frozen=True)
class Draft:
    """A document while it is generated.

    Attributes:
      document: holes that were not reached yet are holes. A text has the words so far. An image
        has its codes so far, the last one repeated.
      image_part: the index of the part that is an unfinished image; None if there is none.
      num_codes: how many codes of this image are generated.
      done: whether the document is complete.
    """

    document: Document
    image_part: int | None
    num_codes: int
    done: bool


class PromptBuilder:
    """Builds the engine's request for one `Request`, and reads what was generated.

    Raises:
      UserError: there are no samples, they differ in `max_tokens`, or a parameter is out of range;
        or a hole begins with rows that do not fit.
    """

    def __init__(self, tokenizer: DocumentTokenizer, request: Request):
        for sample in request.samples:
            sample.params.check()
        limits = {sample.params.max_tokens for sample in request.samples}
        if len(limits) != 1:
            raise UserError(
                f"max_tokens is {sorted(limits)} for samples of one prompt; it must be one number"
            )
        (self.max_tokens,) = limits
        self.tokenizer, self.request = tokenizer, request
        self.document = request.document
        self.prefixes = {part: self._prefix(part) for part in self.document.holes}
        holes = self.document.holes
        # A hole at the end is continued causally, and is filled first.
        self.is_open = bool(holes) and holes[-1] == len(self.document.parts) - 1
        self.order = [holes[-1], *holes[:-1]] if self.is_open else list(holes)

    def build(self) -> TokenRequest:
        """The request: its streams are those that the guidance of some sample reads.

        Raises:
          UserError: a document cannot be encoded, or the guidance of two samples needs streams that
            differ.
        """
        samples = tuple(map(self._without_useless_guidance, self.request.samples))
        conditions = max((s.params.guidance.conditions for s in samples), key=len)
        for sample in samples:
            needed = sample.params.guidance.conditions
            if conditions[: len(needed)] != needed:
                raise UserError(
                    f"samples of one prompt have guidance by {conditions} and by {needed}; give "
                    "them to separate prompts"
                )
        masked = [_mask(self.document, condition) for condition in conditions]
        streams = []
        for document, condition in zip(masked, conditions, strict=True):
            retrieved = self.request.retrieved if condition == "all" else ()
            streams.append(self._prompt_ids(document, retrieved))
        return TokenRequest(tuple(streams), tuple(self._grammar(masked)), samples)

    def fill(self, outputs: Sequence[SpanOutput]) -> Document:
        """The document with what was generated; its new images have codes only."""
        contents = self._contents(outputs)
        document, vocabulary = self.document, self.tokenizer.vocabulary
        if self.is_open:
            document = self.tokenizer.fill(document, contents.pop(0))
        ids: list[np.ndarray] = []
        for index, content in enumerate(contents):
            ids += [np.array([vocabulary.sentinel(index)], np.int32)] if index else []
            ids += [content, np.array([vocabulary.eoss], np.int32)]
        return self.tokenizer.fill(document, np.concatenate(ids)) if ids else document

    def draft(self, outputs: Sequence[SpanOutput], done: bool) -> Draft:
        """The document with what was generated so far."""
        if done:
            return Draft(self.fill(outputs), None, 0, True)
        tokenizer, vocabulary = self.tokenizer, self.tokenizer.vocabulary
        document, image_part, num_codes = self.document, None, 0
        for part, ids in zip(self.order, self._contents(outputs), strict=False):
            if _modality(self.document.parts[part]) == "text":
                text = tokenizer.text.decode((ids - vocabulary.text_start).tolist())
                document = document.replace(part, Text(text))
            elif len(ids):
                missing = tokenizer.image_tokens - len(ids)
                image_part, num_codes = (part, len(ids)) if missing else (None, 0)
                codes = np.pad(ids - vocabulary.image_start, (0, missing), mode="edge")
                codes = codes.astype(np.int32).reshape(tokenizer.image_shape)
                document = document.replace(part, Image(codes=codes))
        return Draft(document, image_part, num_codes, False)

    def _without_useless_guidance(self, sample: Sample) -> Sample:
        """Without guidance if no hole is an image."""
        if any(_modality(part) == "image" for part in self.document.parts):
            return sample
        params = dataclasses.replace(sample.params, guidance=Plain())
        return dataclasses.replace(sample, params=params)

    def _contents(self, outputs: Sequence[SpanOutput]) -> list[np.ndarray]:
        """The ids of each hole that was reached, in the order in which they are filled."""
        generated = [
            output.ids
            for output, span in zip(outputs, self._grammar([self.document]), strict=False)
            if not isinstance(span, Forced)
        ]
        return [
            np.concatenate([self.prefixes[part], ids])
            for part, ids in zip(self.order, generated, strict=False)
        ]

    def _prefix(self, part: int) -> np.ndarray:
        """The ids that a hole begins with."""
        hole, tokenizer = self.document.parts[part], self.tokenizer
        assert isinstance(hole, Hole)
        codes, (rows, columns) = np.array(hole.first_rows, np.int32), tokenizer.image_shape
        if not codes.size:
            return np.zeros(0, np.int32)
        if codes.shape[1] != columns or len(codes) >= rows:
            raise UserError(
                f"the first rows of an image have {list(codes.shape)} codes; this model generates "
                f"{list(tokenizer.image_shape)}, so give fewer than {rows} rows of {columns}"
            )
        if codes.min() < 0 or codes.max() >= tokenizer.vocabulary.image_codes:
            raise UserError(
                f"the first rows of an image have codes from {codes.min()} to {codes.max()}; they "
                f"must be from 0 to {tokenizer.vocabulary.image_codes - 1}"
            )
        return tokenizer.vocabulary.image_start + codes.ravel()

    def _grammar(self, masked: Sequence[Document]) -> list[Span]:
        """What fills the holes, in the order in which they are filled.

        Args:
          masked: the document as each stream reads it, which decides the number of a sentinel.
        """
        vocabulary = self.tokenizer.vocabulary
        grammar: list[Span] = []
        for index, part in enumerate(self.order):
            is_last_part = self.is_open and index == 0
            if not is_last_part and (index or self.is_open):
                grammar.append(Forced(tuple(self._sentinel(document, part) for document in masked)))
            if _modality(self.document.parts[part]) == "image":
                prefix = self.prefixes[part]
                if index:  # the prompt ends with the prefix of the first hole
                    grammar += [Forced((id_,)) for id_ in prefix.tolist()]
                grammar.append(ImageSpan(self.tokenizer.image_tokens - len(prefix)))
                grammar.append(Forced((vocabulary.eos if is_last_part else vocabulary.eoss,)))
            else:
                make = TextSpan.causal if is_last_part else TextSpan.infill
                grammar.append(make(vocabulary, self.max_tokens))
        # Nothing reads the id that closes the last hole.
        return grammar[:-1] if grammar and isinstance(grammar[-1], Forced) else grammar

    def _prompt_ids(self, document: Document, retrieved: Sequence[Document]) -> np.ndarray:
        """Retrieved documents, the document, and what comes before the first generated id."""
        ids = [self.tokenizer.encode([*retrieved, document], is_open=self.is_open)]
        if self.order and not self.is_open:
            ids.append(np.array([self._sentinel(document, self.order[0])], np.int32))
        return np.concatenate([*ids, *(self.prefixes[part] for part in self.order[:1])])

    def _sentinel(self, document: Document, part: int) -> int:
        return self.tokenizer.vocabulary.sentinel(document.holes.index(part))


def _modality(part: object) -> str | None:
    return part.modality if isinstance(part, Hole) else None


def _mask(document: Document, condition: Condition) -> Document:
    """The document as a stream of this condition reads it."""
    if condition == "all":
        return document

    def mask(part: Part) -> Part:
        if isinstance(part, Text):
            return Hole("text")
        return Hole("image") if isinstance(part, Image) and condition == "nothing" else part

    return Document(tuple(map(mask, document.parts)))
