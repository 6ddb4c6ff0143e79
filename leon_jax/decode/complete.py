"""Completing documents: every hole of every request filled, through the engine.

A hole at the end of a document is continued causally; holes before the end are infilled, in order,
behind the whole document. All holes of a request are filled in one go: its script says what may be
written into each, and forces the marks between them.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from leon_jax.config import UserError
from leon_jax.decode.engine import Engine, Prompt, Sample
from leon_jax.decode.grammar import Forced, ImageSpan, Part, Span, TextSpan
from leon_jax.decode.guidance import Condition, Plain
from leon_jax.decode.strategy import Strategy
from leon_jax.documents import Document, Hole, Image, Text
from leon_jax.documents import Part as DocumentPart
from leon_jax.tokenizers.documents import DocumentTokenizer


@dataclasses.dataclass(frozen=True)
class Request:
    """A document with holes, what it may read first, and how it is answered.

    Pictures need codes.

    Attributes:
      document, retrieved: retrieved documents have no holes.
      seed: of the draws, 0..2**32 - 1.
      strategy: how ids are drawn. Guidance is of picture holes; texts are filled without.
      text_limit: most tokens of a text hole.
    """

    document: Document
    retrieved: tuple[Document, ...] = ()
    seed: int = 0
    strategy: Strategy = dataclasses.field(default_factory=Strategy)
    text_limit: int = 64


def complete(
    engine: Engine, tokenizer: DocumentTokenizer, requests: Sequence[Request]
) -> list[Document]:
    """Fills all holes; a request's result does not depend on the other requests.

    Returns:
      One document a request, without holes; new pictures hold codes only.

    Raises:
      UserError: a prompt and its answer do not fit the context, or a document cannot be encoded;
        of several requests the message says which one.
    """
    documents: list = [None] * len(requests)
    for number, result in completions(engine, tokenizer, requests):
        if isinstance(result, UserError):
            raise UserError(f"request {number}: {result}") if len(requests) > 1 else result
        documents[number] = result
    return documents


def completions(
    engine: Engine, tokenizer: DocumentTokenizer, requests: Sequence[Request]
) -> Iterator[tuple[int, Document | UserError]]:
    """The place of each request and its document, or what is wrong with it, as they are done.

    Requests that ask the same differ in seed and strategy only: they share their prompt.
    """
    groups: dict[tuple, list[int]] = {}
    prompts: dict[tuple, tuple[_Job, Prompt]] = {}
    for number, request in enumerate(requests):
        try:
            job = _Job(tokenizer, request)
            prompt = job.prompt()
            if prompt.script:
                engine.check(prompt)
        except UserError as error:
            yield number, error
            continue
        if not prompt.script:
            yield number, request.document
            continue
        key = prompt.script, *(stream.tobytes() for stream in prompt.streams)
        groups.setdefault(key, []).append(number)
        prompts.setdefault(key, (job, prompt))
    shared = [
        dataclasses.replace(
            prompt,
            samples=tuple(_sample(requests[number]) for number in groups[key]),
        )
        for key, (_, prompt) in prompts.items()
    ]
    numbers, jobs = list(groups.values()), [job for job, _ in prompts.values()]
    for answer in engine.run(shared):
        yield numbers[answer.prompt][answer.sample], jobs[answer.prompt].filled(answer.parts)


@dataclasses.dataclass(frozen=True)
class Draft:
    """What there is of an answer so far.

    Attributes:
      document: holes that were not reached yet are holes; a text that is being written is as long
        as it is; a picture that is being drawn has its codes so far, the last one repeated.
      place: position in the document of a picture that is being drawn; None if none is.
      drawn: how many of its codes are there.
      done: whether this is all.
    """

    document: Document
    place: int | None
    drawn: int
    done: bool


def drafts(
    engine: Engine, tokenizer: DocumentTokenizer, request: Request, every: int
) -> Iterator[Draft]:
    """The answer to a request after every so many ids, and in the end all of it.

    Raises:
      UserError: see `complete`.
    """
    job = _Job(tokenizer, request)
    prompt = job.prompt()
    if not prompt.script:
        yield Draft(request.document, None, 0, True)
        return
    for answer in engine.run([prompt], every):
        yield job.draft(answer.parts, answer.done)


def warm(
    engine: Engine, tokenizer: DocumentTokenizer, request: Request, samples: int, prompts: int = 1
) -> int:
    """Compiles what so many samples of each of so many prompts need; see `Engine.warm`."""
    prompt = _Job(tokenizer, request).prompt()
    return engine.warm([dataclasses.replace(prompt, samples=prompt.samples * samples)] * prompts)


def _sample(request: Request) -> Sample:
    strategy = request.strategy
    if not any(_modality(part) == "image" for part in request.document.parts):
        strategy = dataclasses.replace(strategy, guidance=Plain())
    return Sample(request.seed, strategy)


class _Job:
    """The prompt and the script of a request, and what its answer means."""

    def __init__(self, tokenizer: DocumentTokenizer, request: Request):
        if request.text_limit < 1:
            raise UserError(f"max_tokens is {request.text_limit}; it must be at least 1")
        self.tokenizer, self.request = tokenizer, request
        self.document = request.document
        self.begun = {place: self._begun(place) for place in self.document.holes}
        holes = self.document.holes
        # Whether the document ends in a hole, which is continued causally and comes first.
        self.open = bool(holes) and holes[-1] == len(self.document.parts) - 1
        self.order = [holes[-1], *holes[:-1]] if self.open else list(holes)

    def prompt(self) -> Prompt:
        """The streams that the strategy reads, and the script of all holes."""
        strategy = _sample(self.request).strategy
        masked = [_masked(self.document, each) for each in strategy.guidance.conditions]
        streams = []
        for document, condition in zip(masked, strategy.guidance.conditions, strict=True):
            retrieved = self.request.retrieved if condition == "all" else ()
            streams.append(self._ids(document, retrieved))
        return Prompt(tuple(streams), tuple(self._script(masked)), (_sample(self.request),))

    def filled(self, parts: Sequence[Part]) -> Document:
        """The document with what was written."""
        written = self._written(parts)
        document, vocabulary = self.document, self.tokenizer.vocabulary
        if self.open:
            document = self.tokenizer.fill(document, written.pop(0))
        ids: list[np.ndarray] = []
        for index, content in enumerate(written):
            ids += [np.array([vocabulary.sentinel(index)], np.int32)] if index else []
            ids += [content, np.array([vocabulary.eoss], np.int32)]
        return self.tokenizer.fill(document, np.concatenate(ids)) if ids else document

    def draft(self, parts: Sequence[Part], done: bool) -> Draft:
        """The document with what was written so far."""
        if done:
            return Draft(self.filled(parts), None, 0, True)
        document, tokenizer, place, drawn = self.document, self.tokenizer, None, 0
        for position, ids in zip(self.order, self._written(parts), strict=False):
            if _modality(self.document.parts[position]) == "text":
                text = tokenizer.text.decode((ids - tokenizer.vocabulary.text_start).tolist())
                document = document.replace(position, Text(text))
            elif len(ids):
                missing = tokenizer.image_tokens - len(ids)
                place, drawn = (position, len(ids)) if missing else (None, 0)
                codes = np.pad(ids - tokenizer.vocabulary.image_start, (0, missing), mode="edge")
                codes = codes.astype(np.int32).reshape(tokenizer.image_shape)
                document = document.replace(position, Image(codes=codes))
        return Draft(document, place, drawn, False)

    def _written(self, parts: Sequence[Part]) -> list[np.ndarray]:
        """What stands in each hole that was reached, in the order in which they are filled."""
        written = [
            part.ids
            for part, span in zip(parts, self._script([self.document]), strict=False)
            if not isinstance(span, Forced)
        ]
        return [
            np.concatenate([self.begun[position], ids])
            for position, ids in zip(self.order, written, strict=False)
        ]

    def _begun(self, position: int) -> np.ndarray:
        """The ids that a hole begins with."""
        hole, tokenizer = self.document.parts[position], self.tokenizer
        assert isinstance(hole, Hole)
        codes, (rows, columns) = np.array(hole.first_rows, np.int32), tokenizer.image_shape
        if not codes.size:
            return np.zeros(0, np.int32)
        if codes.shape[1] != columns or len(codes) >= rows:
            raise UserError(
                f"the first rows of a picture have {list(codes.shape)} codes; this model draws "
                f"{list(tokenizer.image_shape)}, so give fewer than {rows} rows of {columns}"
            )
        if codes.min() < 0 or codes.max() >= tokenizer.vocabulary.image_codes:
            raise UserError(
                f"the first rows of a picture have codes from {codes.min()} to {codes.max()}; they "
                f"must be from 0 to {tokenizer.vocabulary.image_codes - 1}"
            )
        return tokenizer.vocabulary.image_start + codes.ravel()

    def _script(self, masked: Sequence[Document]) -> list[Span]:
        """What fills the holes, in the order in which they are filled.

        Args:
          masked: the document as each stream says it: it decides how sentinels are counted.
        """
        vocabulary = self.tokenizer.vocabulary
        script: list[Span] = []
        for place, position in enumerate(self.order):
            ending = self.open and place == 0
            if not ending and (place or self.open):
                script.append(
                    Forced(tuple(self._sentinel(document, position) for document in masked))
                )
            if _modality(self.document.parts[position]) == "image":
                begun = self.begun[position]
                if place:  # the prompt ends with those of the first hole
                    script += [Forced((id_,)) for id_ in begun.tolist()]
                script.append(ImageSpan(self.tokenizer.image_tokens - len(begun)))
                script.append(Forced((vocabulary.eos if ending else vocabulary.eoss,)))
            else:
                make = TextSpan.causal if ending else TextSpan.infill
                script.append(make(vocabulary, self.request.text_limit))
        # Nothing reads what closes the last hole.
        return script[:-1] if script and isinstance(script[-1], Forced) else script

    def _ids(self, document: Document, retrieved: Sequence[Document]) -> np.ndarray:
        """Retrieved documents, the document, and all that stands before what is written first."""
        ids = [self.tokenizer.encode([*retrieved, document], is_open=self.open)]
        if self.order and not self.open:
            ids.append(np.array([self._sentinel(document, self.order[0])], np.int32))
        return np.concatenate([*ids, *(self.begun[place] for place in self.order[:1])])

    def _sentinel(self, document: Document, position: int) -> int:
        return self.tokenizer.vocabulary.sentinel(document.holes.index(position))


def _modality(part: object) -> str | None:
    return part.modality if isinstance(part, Hole) else None


def _masked(document: Document, condition: Condition) -> Document:
    """What a stream is told of a document; whether it is open the document decides."""
    if condition == "all":
        return document

    def mask(part: DocumentPart) -> DocumentPart:
        if isinstance(part, Text):
            return Hole("text")
        return Hole("image") if isinstance(part, Image) and condition == "nothing" else part

    return Document(tuple(map(mask, document.parts)))
