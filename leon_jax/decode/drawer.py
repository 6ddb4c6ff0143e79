"""Drawing pictures for people: prompts in, pictures with their story out."""

import dataclasses
import os
from collections.abc import Iterator, Sequence

import jax
import numpy as np
import PIL.Image

from leon_jax.config import UserError
from leon_jax.decode import rerank
from leon_jax.decode.cache import CacheType
from leon_jax.decode.checkpoint import CAPTION_TOKENS, Checkpoint
from leon_jax.decode.complete import Request, warm
from leon_jax.decode.completer import Completer, check_seeds, make_strategy
from leon_jax.decode.guidance import make_two_conditions
from leon_jax.decode.inputs import Picture, picture_part, text_part
from leon_jax.decode.library import Library, find
from leon_jax.decode.results import Generation, settings
from leon_jax.decode.sampling import make_sampler
from leon_jax.decode.strategy import Strategy
from leon_jax.documents import Document, Hole, Image, Text
from leon_jax.models.decoder import Decoder
from leon_jax.models.inference_weights import weight_dtype
from leon_jax.retrieval.encoder import Encoder
from leon_jax.tokenizers.image import ImageTokenizer

# Prompts whose documents are retrieved before the first of them is drawn.
_PROMPTS = 256


@dataclasses.dataclass(frozen=True)
class _Asked:
    """What is wanted of every prompt: a picture for each strategy, of which some are kept."""

    strategies: Sequence[Strategy]
    num_docs: int
    guidance: float | None
    seed: int
    keep: int | None = None
    rank_by: rerank.Ranking = "clip"
    task: str = "generate"


class Drawer(Completer):
    """A model that retrieves, and draws.

    Args:
      encoder: what is retrieved and ranked by.
      index: the prepared folder to retrieve from; None: one is found, or made.
      checkpoint, decoder, image_tokenizer, mesh, cache: see `Completer`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        decoder: Decoder,
        image_tokenizer: ImageTokenizer,
        encoder: Encoder,
        index: str | os.PathLike | None = None,
        mesh: jax.sharding.Mesh | None = None,
        cache: CacheType = "compute",
    ):
        super().__init__(checkpoint, decoder, image_tokenizer, mesh, cache)
        self.encoder = encoder
        self._index = index
        self._library: Library | None = None

    @property
    def name(self) -> str:
        """Which model this is, for people and for picture metadata."""
        return self.checkpoint.name

    def generate(
        self,
        prompt: str,
        num_images: int = 1,
        num_docs: int = 2,
        guidance: float = 3.0,
        temperature: float = 1.0,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int = 0,
        best_of: int | None = None,
        rank_by: rerank.Ranking = "clip",
        strategy: Strategy | Sequence[Strategy] | None = None,
    ) -> list[Generation]:
        """Draws pictures for a prompt.

        Args:
          prompt: what to show; the demo model's captions read "cat face, Twemoji style".
          num_images: how many pictures; they get the seeds `seed`, `seed` + 1, ...
          num_docs: how many documents to retrieve and read first, at most.
          guidance: classifier-free guidance weight; 1 is none.
          temperature, top_p, top_k: see `leon_jax.decode.sampling.make_sampler`.
          seed: decides the pictures, 0 or more; all seeds are below 2**32.
          best_of: how many are drawn, of which the `num_images` that fit the prompt best are
            returned, best first; by default as many as are returned, in the order of their seeds.
          rank_by: how well a picture fits: "clip", its cosine with the prompt by the retrieval
            encoder, or "likelihood", that of the prompt as a caption of the picture.
          strategy: how ids are drawn, instead of what `guidance`, `temperature`, `top_p` and
            `top_k` say; of several, the pictures take turns.

        Raises:
          UserError: an argument is out of range, or the prompt does not fit.
        """
        ((_, result),) = self.generate_each(
            [prompt], num_images, num_docs, guidance, temperature, top_p, top_k, seed, best_of,
            rank_by, strategy,
        )  # fmt: skip
        if isinstance(result, UserError):
            raise result
        return result

    def generate_each(
        self,
        prompts: Sequence[str],
        num_images: int = 1,
        num_docs: int = 2,
        guidance: float = 3.0,
        temperature: float = 1.0,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int = 0,
        best_of: int | None = None,
        rank_by: rerank.Ranking = "clip",
        strategy: Strategy | Sequence[Strategy] | None = None,
    ) -> Iterator[tuple[int, list[Generation] | UserError]]:
        """Draws pictures for many prompts; they share the device, and come as they are done.

        Args: see `generate`.

        Returns:
          The place of a prompt, and its pictures as `generate` returns them; or what is wrong with
          it, which keeps none of the others.

        Raises:
          UserError: an argument other than a prompt is out of range, or there is nothing to
            retrieve from.
        """
        if isinstance(prompts, str):
            raise UserError("prompts is one text; give a list of them, or use generate")
        if num_images < 1:
            raise UserError(f"num_images is {num_images}; it must be at least 1")
        count = num_images if best_of is None else best_of
        check_seeds(seed, count)
        rerank.check(rank_by, count, num_images)
        self.checkpoint.check_num_docs(num_docs)
        weight = None if strategy else guidance
        strategy = strategy or make_strategy(guidance, temperature, top_p, top_k)
        ways = [strategy] if isinstance(strategy, Strategy) else list(strategy)
        for way in ways:
            way.check()
        if num_docs:
            _ = self.library  # what is wrong with it is wrong with all prompts
        asked = _Asked(
            [ways[place % len(ways)] for place in range(count)], num_docs, weight, seed,
            None if best_of is None else num_images, rank_by,
        )  # fmt: skip
        return self._drawn(prompts, asked)

    def _drawn(
        self, prompts: Sequence[str], asked: "_Asked"
    ) -> Iterator[tuple[int, list[Generation] | UserError]]:
        """See `generate_each`."""
        count = len(asked.strategies)
        for start in range(0, len(prompts), _PROMPTS):
            requests, owners, retrieved = [], [], {}
            for number, prompt in enumerate(prompts[start : start + _PROMPTS], start):
                try:
                    self.checkpoint.check_prompt(prompt, asked.num_docs)
                    document = Document((Text(prompt), Hole("image")))
                    if asked.keep is not None and asked.rank_by == "likelihood":
                        shown = Image(codes=np.zeros(self.checkpoint.documents.image_shape, int))
                        self.engine.check_sequence(self._scored(document.replace(1, shown), 0)[0])
                    room = self.checkpoint.documents.image_tokens
                    retrieved[number] = found = tuple(self._fitting(document, asked.num_docs, room))
                except UserError as error:
                    yield number, error
                    continue
                for place, strategy in enumerate(asked.strategies):
                    requests.append(Request(document, found, asked.seed + place, strategy))
                    owners.append((number, place))
            done: dict[int, dict[int, Document]] = {}
            for index, result in self._completions(requests):
                number, place = owners[index]
                if isinstance(result, UserError):
                    if place == 0:
                        yield number, result
                    continue
                mine = done.setdefault(number, {})
                mine[place] = result
                if len(mine) == count:
                    drawn = [mine[place] for place in range(count)]
                    yield number, self._kept(drawn, prompts[number], retrieved[number], asked)
                    del done[number]

    def warm(
        self,
        num_images: int = 1,
        num_docs: int = 2,
        guidance: float = 3.0,
        temperature: float = 1.0,
        top_p: float | None = None,
        top_k: int | None = None,
        prompts: int = 1,
    ) -> int:
        """Compiles ahead what `generate` needs for prompts and documents of any length.

        Args:
          num_images, num_docs, guidance, temperature, top_p, top_k: as they will be given to
            `generate`; with `best_of`, that many images.
          prompts: how many prompts `generate_each` will be given.

        Returns:
          For how many lengths.

        Raises:
          UserError: an argument is out of range.
        """
        if num_images < 1 or prompts < 1:
            raise UserError(f"{num_images} images of {prompts} prompts; both must be at least 1")
        self.checkpoint.check_num_docs(num_docs)
        strategy = make_strategy(guidance, temperature, top_p, top_k)
        documents = self.checkpoint.documents
        request = Request(Document((Text("a"), Hole("image"))), strategy=strategy)
        self.retrieve(request.document, num_docs)
        with jax.set_mesh(self.mesh):
            self.image_tokenizer.decode(np.zeros((num_images, *documents.image_shape), np.int32))
            return warm(self.engine, documents, request, num_images, min(prompts, _PROMPTS))

    def edit(
        self,
        image: Picture,
        instruction: str,
        num_images: int = 1,
        image_guidance: float = 1.5,
        text_guidance: float = 7.5,
        temperature: float = 1.0,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int = 0,
    ) -> list[Generation]:
        """Draws a picture anew as an instruction says.

        The words around it are those of CM3Leon's instructions (table 5), and so are the weights
        (section 4.1). The demo model has seen none, so it draws what the instruction names.

        Args:
          image: a file, a PIL picture, or sRGB uint8[height, width, 3].
          instruction: what to change.
          num_images: how many pictures; they get the seeds `seed`, `seed` + 1, ...
          image_guidance, text_guidance: weights of the picture and of the instruction; 1 and 1 are
            none (see `leon_jax.decode.guidance.TwoConditions`).
          temperature, top_p, top_k: see `leon_jax.decode.sampling.make_sampler`.
          seed: decides the pictures, 0 or more.

        Raises:
          UserError: an argument is out of range, or the instruction does not fit.
        """
        if not instruction.strip():
            raise UserError("the instruction is empty; say what to change")
        task = Text("Edit first image following the instruction")
        what = text_part("instruction", instruction.strip())
        sampler = make_sampler(temperature, top_p, top_k)
        guidance = make_two_conditions(image_guidance, text_guidance)
        return self._drawn_last(
            Document((task, picture_part(image), what, Hole("image"))), instruction, num_images,
            seed, None, Strategy(guidance, sampler, sampler), "edit",
        )  # fmt: skip

    def extend(
        self,
        image: Picture,
        prompt: str,
        rows: float = 0.5,
        num_images: int = 1,
        guidance: float = 3.0,
        temperature: float = 1.0,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int = 0,
    ) -> list[Generation]:
        """Keeps the upper part of a picture and draws the rest.

        What is kept are its tokens: the result has the model's size, and colours near the border
        may change a little, for the image tokenizer looks across it.

        Args:
          image: a file, a PIL picture, or sRGB uint8[height, width, 3].
          prompt: what the whole picture shows.
          rows: the share that is kept, more than 0 and less than 1; rounded to rows of tokens.
          num_images: how many pictures; they get the seeds `seed`, `seed` + 1, ...
          guidance, temperature, top_p, top_k, seed: see `generate`.

        Raises:
          UserError: see `generate`; or nothing, or all, of the picture is kept.
        """
        height = self.checkpoint.documents.image_shape[0]
        kept = round(rows * height) if 0 < rows < 1 else 0
        if not 0 < kept < height:
            raise UserError(
                f"rows is {rows}; it is a share, and a picture has {height} rows of tokens, so "
                f"keep {1 / height:g} of it to {1 - 1 / height:g}"
            )
        self.checkpoint.check_prompt(prompt, 0)
        codes = self.tokenize(Document((picture_part(image),))).codes
        return self._drawn_last(
            Document((Text(prompt), Hole("image", codes[:kept]))), prompt, num_images, seed,
            guidance, make_strategy(guidance, temperature, top_p, top_k),
            f"extend, {kept} of {height} rows",
        )  # fmt: skip

    def _drawn_last(
        self,
        document: Document,
        prompt: str,
        num_images: int,
        seed: int,
        guidance: float | None,
        strategy: Strategy,
        task: str,
    ) -> list[Generation]:
        """What is drawn into the last hole of a document, with the seeds from `seed` on."""
        if num_images < 1:
            raise UserError(f"num_images is {num_images}; it must be at least 1")
        check_seeds(seed, num_images)
        ways = [strategy] * num_images
        requests = self._requests(
            [self.tokenize(document)] * num_images, None, range(seed, seed + num_images),
            CAPTION_TOKENS, ways,
        )  # fmt: skip
        done: list = [None] * num_images
        for number, result in self._completions(requests):
            if isinstance(result, UserError):
                raise result
            done[number] = result
        return self._generations(
            self._with_pixels(done), prompt, _Asked(ways, 0, guidance, seed, task=task), ()
        )

    def retrieve(self, document: Document, num_docs: int) -> list[Document]:
        """At most `num_docs` documents for a prompt, most relevant first.

        Raises:
          UserError: there is no folder to retrieve from and none can be made.
        """
        if num_docs < 1:
            return []
        with jax.set_mesh(self.mesh):
            return self.library.select(document, num_docs)

    @property
    def library(self) -> Library:
        """What is retrieved from; made or read when it is first asked for.

        Raises:
          UserError: there is no folder to retrieve from and none can be made.
        """
        if self._library is None:
            with jax.set_mesh(self.mesh):
                self._library = Library(find(self.checkpoint.folder, self._index), self.encoder)
        return self._library

    def _kept(
        self,
        documents: list[Document],
        prompt: str,
        retrieved: Sequence[Document],
        asked: "_Asked",
    ) -> list[Generation]:
        """The pictures for a prompt, or only those of them that fit it best, best first."""
        documents = self._with_pixels(documents)
        generations = self._generations(documents, prompt, asked, retrieved)
        if asked.keep is None:
            return generations
        with jax.set_mesh(self.mesh):
            if asked.rank_by == "likelihood":
                rows = [self._scored(done, part=0) for done in documents]
                scores = self.engine.score([ids for ids, _ in rows], [weight for _, weight in rows])
            else:
                drawn = [np.asarray(generation.image) for generation in generations]
                scores = rerank.by_clip(self.encoder, prompt, drawn)
        return [generations[place] for place in rerank.best(scores, asked.keep)]

    def _generations(
        self,
        documents: Sequence[Document],
        prompt: str,
        asked: "_Asked",
        retrieved: Sequence[Document],
    ) -> list[Generation]:
        """The pictures at the ends of documents, one for each strategy that was asked for."""
        generations = []
        for number, (done, strategy) in enumerate(zip(documents, asked.strategies, strict=True)):
            picture = done.parts[-1]
            assert isinstance(picture, Image) and picture.pixels is not None
            best_of = None if asked.keep is None else len(asked.strategies)
            generations.append(
                Generation(
                    PIL.Image.fromarray(picture.pixels), prompt, asked.seed + number,
                    asked.guidance, tuple(retrieved), self.name,
                    settings(
                        strategy, asked.num_docs, self.checkpoint.digest,
                        (weight_dtype(self.decoder), self.engine.kept),
                        best_of, asked.rank_by, asked.task,
                    ),
                )
            )  # fmt: skip
        return generations

    def _fitting(self, document: Document, num_docs: int, answer: int) -> list[Document]:
        return self.checkpoint.fitting(self.retrieve(document, num_docs), document, answer)
