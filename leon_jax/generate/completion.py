"""Completes documents: runs requests through the engine's scheduler and fills their holes."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from leon_jax.config import UserError
from leon_jax.documents import Document, Image
from leon_jax.engine.engine import Engine, Sample
from leon_jax.engine.sampling_params import SamplingParams
from leon_jax.engine.scheduler import Admitted, Done, Failed, Scheduler
from leon_jax.generate.image_settings import check_seed
from leon_jax.generate.model import Model
from leon_jax.generate.prompt_builder import Draft, PromptBuilder, Request
from leon_jax.tokenizers.documents import DocumentTokenizer


@dataclasses.dataclass(frozen=True)
class Completion:
    """The result of a request.

    Attributes:
      index: index of the request among all requests.
      request: the request; None if an error was given in its place.
      documents: one document without holes for each sample; generated images have only codes.
        Empty if there is an error.
      error: the reason why there are no documents; None if there are.
    """

    index: int
    request: Request | None
    documents: list[Document]
    error: UserError | None = None


@dataclasses.dataclass
class _Pending:
    """A submitted request, and the documents of its finished samples by sample index."""

    index: int
    builder: PromptBuilder
    documents: dict[int, Document]


def complete(
    engine: Engine,
    tokenizer: DocumentTokenizer,
    requests: Iterable[Request | UserError],
    window: int | None = None,
) -> Iterator[Completion]:
    """Fills all holes of all requests. Yields one completion for each request when it is finished.

    A sample depends only on its request, parameters and seed, not on the other requests. An error
    of one request does not stop the others.

    Args:
      engine: the engine with the decoder.
      tokenizer: the document tokenizer.
      requests: the requests. An error in place of a request becomes the error of its completion.
      window: maximum number of requests that wait for slots; further requests are read later. None:
        all requests are read at once.
    """
    scheduler, pending = Scheduler(engine), dict[int, _Pending]()
    arriving: Iterator[tuple[int, Request | UserError]] | None = enumerate(requests)
    while arriving is not None or scheduler.is_busy:
        while arriving is not None and (window is None or scheduler.waiting < window):
            index, request = next(arriving, (-1, None))
            if request is None:
                arriving = None
                break
            if isinstance(request, UserError):
                yield Completion(index, None, [], request)
                continue
            try:
                builder = PromptBuilder(tokenizer, request)
                token_request = builder.build()
                if not token_request.grammar:  # the document has no hole
                    yield Completion(index, request, [request.document] * len(request.samples))
                    continue
                pending[scheduler.submit(token_request)] = _Pending(index, builder, {})
            except UserError as error:
                yield Completion(index, request, [], error)
        for event in scheduler.step():
            if isinstance(event, Admitted) or event.request not in pending:
                continue
            entry = pending[event.request]
            request = entry.builder.request
            if isinstance(event, Failed):
                scheduler.cancel(event.request)
                del pending[event.request]
                yield Completion(entry.index, request, [], event.error)
                continue
            entry.documents[event.sample] = entry.builder.fill(event.outputs)
            if len(entry.documents) == len(request.samples):
                del pending[event.request]
                documents = [entry.documents[sample] for sample in range(len(request.samples))]
                yield Completion(entry.index, request, documents)


def stream(model: Model, request: Request) -> Iterator[Draft]:
    """Yields drafts of a request with one sample; the last draft is the complete document.

    There is a draft after each row of an image's tokens, and after the same number of text tokens.
    All images have pixels. The rows of an image that are not generated yet are white.

    Args:
      model: the loaded model.
      request: a request whose images have codes.

    Raises:
      UserError: the request does not fit the context, or cannot be encoded or finished.
    """
    tokenizer = model.tokenizer
    rows, columns = tokenizer.image_shape
    for draft in token_drafts(model.engine, tokenizer, request, columns):
        (document,) = model.decode_images([draft.document])
        if draft.image_part is not None:
            image = document.parts[draft.image_part]
            assert isinstance(image, Image) and image.pixels is not None
            pixels = image.pixels.copy()
            pixels[draft.num_codes // columns * len(pixels) // rows :] = 255
            document = document.replace(draft.image_part, Image(pixels, image.codes))
        yield dataclasses.replace(draft, document=document)


def token_drafts(
    engine: Engine, tokenizer: DocumentTokenizer, request: Request, every: int
) -> Iterator[Draft]:
    """Yields drafts of a request with one sample; generated images have only codes.

    Args:
      engine: the engine with the decoder.
      tokenizer: the document tokenizer.
      request: a request whose images have codes.
      every: number of ids between two drafts. In an image, there is a draft after each multiple of
        this number of its ids.

    Raises:
      UserError: see `stream`.
    """
    builder = PromptBuilder(tokenizer, request)
    token_request = builder.build()
    if not token_request.grammar:
        yield Draft(request.document, None, 0, True)
        return
    scheduler = Scheduler(engine, every)
    scheduler.submit(token_request)
    while scheduler.is_busy:
        for event in scheduler.step():
            if isinstance(event, Failed):
                raise event.error
            if not isinstance(event, Admitted):
                yield builder.draft(event.outputs, isinstance(event, Done))


def make_requests(
    model: Model,
    documents: Sequence[Document],
    retrieved: Sequence[Sequence[Document]] | None,
    seeds: Sequence[int] | None,
    params: SamplingParams | Sequence[SamplingParams] | None,
) -> list[Request]:
    """Returns a request with one sample for each document. All images get codes.

    The arguments are those of `leon_jax.leon.Leon.complete`.

    Raises:
      UserError: an item of `documents` is not a Document, another argument does not have one item
        for each document, or a number is out of range.
    """
    for document in documents:
        if not isinstance(document, Document):
            raise UserError(f"{document!r} is no Document; make one of Text, Image and Hole")
    count = len(documents)
    if params is None or isinstance(params, SamplingParams):
        params = [params or SamplingParams()] * count
    params = _one_each("params", params, count)
    seeds = _one_each("seeds", range(count) if seeds is None else seeds, count)
    contexts = _one_each("retrieved", [()] * count if retrieved is None else retrieved, count)
    if any(isinstance(context, Document) for context in contexts):
        raise UserError("retrieved: a document; give a sequence of documents for each document")
    requests = []
    for document, context, seed, each in zip(documents, contexts, seeds, params, strict=True):
        check_seed(seed)
        each.check()
        requests.append(
            Request(
                model.encode_images(document),
                tuple(map(model.encode_images, context)),
                (Sample(int(seed), each),),
            )
        )
    return requests


def _one_each[Item](name: str, items: Iterable[Item], count: int) -> list[Item]:
    """Returns the items as a list.

    Raises:
      UserError: `items` is not iterable or does not have `count` items.
    """
    listed = list(items) if isinstance(items, Iterable) else None
    if listed is None or len(listed) != count:
        number = items if listed is None else len(listed)
        raise UserError(f"{name}: {number} for {count} documents; give one for each")
    return listed
