"""Converts documents with holes to requests of the engine, and generated ids to documents.

A hole at the end of a document is filled by causal generation. Holes before the end are infilled,
in order, after the whole document. One request fills all holes: its grammar restricts the ids of
each hole and forces the control tokens between holes.
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
    """A document with holes, its retrieved documents and its samples. All images need codes.

    Attributes:
      document: the document whose holes are filled.
      retrieved: documents without holes that come before it in the prompt, in this order.
      samples: one for each result. Their `max_tokens` must be equal. Guidance applies to image
        holes; text holes are filled without guidance.
    """

    document: Document
    retrieved: tuple[Document, ...] = ()
    samples: tuple[Sample, ...] = (Sample(),)


@dataclasses.dataclass(frozen=True)
class Draft:
    """A document during generation.

    Attributes:
      document: the document so far. Holes that generation has not reached stay holes. A text has
        the tokens so far. An unfinished image has the codes so far, and repeats the last one.
      image_part: index of the part that is an unfinished image; None if there is none.
      num_codes: number of codes of this image so far, including those of `Hole.first_rows`; 0 if
        there is no unfinished image.
      done: whether the document is complete.
    """

    document: Document
    image_part: int | None
    num_codes: int
    done: bool


class PromptBuilder:
    """Builds the engine's request for one `Request`, and converts its outputs to documents.

    Raises:
      UserError: there are no samples, they differ in `max_tokens`, a parameter is out of range, the
        model has no such task, or the `first_rows` of a hole do not fit the model's images.
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
        tokenizer.check_task(self.document, len(request.retrieved))
        self.prefixes = {part: self._prefix(part) for part in self.document.holes}
        holes = self.document.holes
        # A hole at the end is filled first, by causal generation.
        self.is_open = bool(holes) and holes[-1] == len(self.document.parts) - 1
        self.order = [holes[-1], *holes[:-1]] if self.is_open else list(holes)

    def build(self) -> TokenRequest:
        """Returns the engine's request. It has the streams that the samples' guidance needs.

        Raises:
          UserError: a document cannot be encoded, or the streams of a sample are not the first
            streams of the sample with the most streams.
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
        """Returns the document with its holes filled; generated images have only codes."""
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
        """Returns the document so far.

        Args:
          outputs: the outputs of the spans that generation has reached.
          done: whether the outputs are complete.
        """
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
        """Removes the guidance of a sample if no hole is an image: texts do not use it."""
        if any(_modality(part) == "image" for part in self.document.parts):
            return sample
        params = dataclasses.replace(sample.params, guidance=Plain())
        return dataclasses.replace(sample, params=params)

    def _contents(self, outputs: Sequence[SpanOutput]) -> list[np.ndarray]:
        """Returns the ids of each hole that generation has reached, in the order of filling.

        They include the prefix of the hole.
        """
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
        """Returns the ids of a hole's `first_rows`.

        Raises:
          UserError: the rows have another length than the model's images, there are too many of
            them, or a code is out of range.
        """
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
        """Returns the spans that fill the holes, in the order of filling.

        Args:
          masked: the document as each stream reads it. Masked parts are holes, so the sentinel of
            a hole can have another number in each stream.
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
        # The id that closes the last hole is left out, because nothing reads it.
        return grammar[:-1] if grammar and isinstance(grammar[-1], Forced) else grammar

    def _prompt_ids(self, document: Document, retrieved: Sequence[Document]) -> np.ndarray:
        """Returns the ids of a stream's prompt.

        They are the retrieved documents, the document, the sentinel of an infill, and the prefix of
        the hole that is filled first.
        """
        ids = [self.tokenizer.encode([*retrieved, document], is_open=self.is_open)]
        if self.order and not self.is_open:
            ids.append(np.array([self._sentinel(document, self.order[0])], np.int32))
        return np.concatenate([*ids, *(self.prefixes[part] for part in self.order[:1])])

    def _sentinel(self, document: Document, part: int) -> int:
        return self.tokenizer.vocabulary.sentinel(document.holes.index(part))


def _modality(part: object) -> str | None:
    return part.modality if isinstance(part, Hole) else None


def _mask(document: Document, condition: Condition) -> Document:
    """Returns the document as the stream of a condition reads it: other parts become holes."""
    if condition == "all":
        return document

    def mask(part: Part) -> Part:
        if isinstance(part, Text):
            return Hole("text")
        return Hole("image") if isinstance(part, Image) and condition == "nothing" else part

    return Document(tuple(map(mask, document.parts)))
