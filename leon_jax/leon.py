"""Leon: the few calls a person makes.

    leon = Leon.load()
    leon.generate("cat face, Twemoji style", num_images=4)[0].image
    leon.caption("cat.png").text

Everything is completion of documents underneath: `complete` fills any holes of any document.
"""

import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import PIL.Image
from flax import nnx
from jaxtyping import UInt8

from leon_jax import __version__, model_files
from leon_jax.config import UserError
from leon_jax.data import pictures
from leon_jax.decode import rerank
from leon_jax.decode.checkpoint import CAPTION_TOKENS, FILES, Checkpoint, encoder_path, model_folder
from leon_jax.decode.complete import Request, completions, warm
from leon_jax.decode.completer import Completer, current_mesh
from leon_jax.decode.guidance import make_guidance, make_two_conditions
from leon_jax.decode.library import Library, find
from leon_jax.decode.results import Caption, Generation, credit
from leon_jax.decode.sampling import make_sampler
from leon_jax.decode.strategy import Strategy
from leon_jax.documents import Document, Hole, Image, Text
from leon_jax.models.decoder import Decoder
from leon_jax.retrieval.encoder import Encoder
from leon_jax.tokenizers.image import ImageTokenizer

# Prompts whose documents are retrieved before the first of them is drawn.
_PROMPTS = 256

Picture = str | os.PathLike | PIL.Image.Image | UInt8[np.ndarray, "height width 3"]

__all__ = ["Caption", "Generation", "Leon", "Picture", "credit", "model_folder"]


class Leon(Completer):
    """A model with everything it needs to answer. Make one with `Leon.load`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        decoder: Decoder,
        image_tokenizer: ImageTokenizer,
        encoder: Encoder,
        index: str | os.PathLike | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ):
        super().__init__(checkpoint, decoder, image_tokenizer, mesh)
        self.encoder = encoder
        self._index = index
        self._library: Library | None = None

    @classmethod
    def load(
        cls, checkpoint: str | os.PathLike | None = None, index: str | os.PathLike | None = None
    ) -> "Leon":
        """Reads a model folder.

        Args:
          checkpoint: decoder.safetensors, tokenizer.safetensors, text.json, and
            encoder.safetensors or a folder `encoder` with OpenAI's CLIP; None: the model that
            comes with the package.
          index: the prepared folder to retrieve from; None: one is found, or made when it is first
            needed (see `leon_jax.decode.library.find`).

        Raises:
          UserError: a file is missing or damaged, or the files do not belong together.
        """
        found = Checkpoint.open(model_folder(checkpoint))
        if index is not None:
            find(found.folder, index)
        path = found.folder / "decoder.safetensors"
        mesh = current_mesh()
        with jax.set_mesh(mesh):
            arrays, _ = model_files.load(path, "decoder")
            abstract = jax.eval_shape(lambda: Decoder(found.config, rngs=nnx.Rngs(0)))
            decoder = model_files.restore(abstract, arrays, str(path)).split()
            tokenizer = ImageTokenizer.load(found.folder / "tokenizer.safetensors")
            text = found.documents.text
            encoder = Encoder.load(encoder_path(found.folder), text, batch_size=8)
        return cls(found, decoder, tokenizer, encoder, index, mesh)

    @property
    def name(self) -> str:
        """Which model this is, for people and for picture metadata."""
        return f"leon_jax {__version__} {self.checkpoint.folder.absolute().name}"

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
    ) -> list[Generation]:
        """Draws pictures for a prompt.

        Args:
          prompt: what to show; the demo model's captions read "cat face, Twemoji style".
          num_images: how many pictures; they get the seeds `seed`, `seed` + 1, ...
          num_docs: how many documents to retrieve and read first, at most.
          guidance: classifier-free guidance weight; 1 is none.
          temperature, top_p, top_k: see `leon_jax.decode.sampling.make_sampler`.
          seed: decides the pictures, 0 or more.
          best_of: how many are drawn, of which the `num_images` that fit the prompt best are
            returned, best first; by default as many as are returned, in the order of their seeds.
          rank_by: how well a picture fits: "clip", its cosine with the prompt by the retrieval
            encoder, or "likelihood", that of the prompt as a caption of the picture.

        Raises:
          UserError: an argument is out of range, or the prompt does not fit.
        """
        ((_, result),) = self.generate_each(
            [prompt], num_images, num_docs, guidance, temperature, top_p, top_k, seed, best_of,
            rank_by,
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
    ) -> Iterator[tuple[int, list[Generation] | UserError]]:
        """Draws pictures for many prompts; they share the device, and come as they are done.

        Args: see `generate`.

        Yields:
          The place of a prompt, and its pictures as `generate` returns them; or what is wrong with
          it, which keeps none of the others.

        Raises:
          UserError: an argument other than a prompt is out of range.
        """
        if num_images < 1:
            raise UserError(f"num_images is {num_images}; it must be at least 1")
        if seed < 0:
            raise UserError(f"seed is {seed}; it must be 0 or more")
        count = num_images if best_of is None else best_of
        rerank.check(rank_by, count, num_images)
        sampler = make_sampler(temperature, top_p, top_k)
        strategy = Strategy(make_guidance(guidance), sampler, sampler)
        for start in range(0, len(prompts), _PROMPTS):
            requests, owners, retrieved = [], [], {}
            for number, prompt in enumerate(prompts[start : start + _PROMPTS], start):
                try:
                    self.checkpoint.check_prompt(prompt, num_docs)
                    document = Document((Text(prompt), Hole("image")))
                    room = self.checkpoint.documents.image_tokens
                    retrieved[number] = found = tuple(self._fitting(document, num_docs, room))
                except UserError as error:
                    yield number, error
                    continue
                for place in range(count):
                    requests.append(Request(document, found, seed + place, strategy))
                    owners.append((number, place))
            done: dict[int, dict[int, Document]] = {}
            results = completions(self.engine, self.checkpoint.documents, requests)
            for index, result in self._on_mesh(results):
                number, place = owners[index]
                if isinstance(result, UserError):
                    if place == 0:
                        yield number, result
                    continue
                mine = done.setdefault(number, {})
                mine[place] = result
                if len(mine) == count:
                    drawn = [mine[place] for place in range(count)]
                    yield number, self._kept(
                        drawn, prompts[number], seed, guidance, retrieved[number],
                        None if best_of is None else num_images, rank_by,
                    )  # fmt: skip
                    del done[number]

    def warm(self, num_images: int = 1, guidance: float = 3.0, **sampling: Any) -> int:
        """Compiles ahead what `generate` needs for prompts and documents of any length.

        Args:
          num_images, guidance: as they will be given to `generate`.
          sampling: likewise, `temperature`, `top_p` and `top_k`.

        Returns:
          For how many lengths.

        Raises:
          UserError: an argument is out of range.
        """
        sampler = make_sampler(**sampling)
        strategy = Strategy(make_guidance(guidance), sampler, sampler)
        documents = self.checkpoint.documents
        request = Request(Document((Text("a"), Hole("image"))), strategy=strategy)
        with jax.set_mesh(self.mesh):
            return warm(self.engine, documents, request, num_images)

    def caption(
        self,
        image: Picture,
        num_docs: int = 0,
        max_tokens: int = CAPTION_TOKENS,
        temperature: float = 0.0,
        top_p: float | None = None,
        seed: int = 0,
    ) -> Caption:
        """Writes a caption for a picture: the text before it is infilled.

        Args:
          image: a file, a PIL picture, or sRGB uint8[height, width, 3].
          num_docs: how many documents to retrieve and read first, at most.
          max_tokens: where a caption is cut.
          temperature: 0 writes the most likely caption, token by token.
          top_p: see `leon_jax.decode.sampling.make_sampler`.
          seed: decides the caption if the temperature is above 0.

        Raises:
          UserError: the file is no picture that can be read, or an argument is out of range.
        """
        document = Document((Hole("text"), picture_part(image)))
        return self._written(document, 0, num_docs, max_tokens, temperature, top_p, seed)

    def answer(
        self,
        image: Picture,
        question: str,
        num_docs: int = 0,
        max_tokens: int = CAPTION_TOKENS,
        temperature: float = 0.0,
        top_p: float | None = None,
        seed: int = 0,
    ) -> Caption:
        """Answers a question about a picture: the text after the question is infilled.

        The question stands before the picture, as in CM3Leon's instructions (table 5). The demo
        model has seen none, so what it writes is a caption at best.

        Args:
          image: a file, a PIL picture, or sRGB uint8[height, width, 3].
          question: any text.
          num_docs, max_tokens, temperature, top_p, seed: see `caption`.

        Raises:
          UserError: see `caption`; or the question is empty or too long.
        """
        if not question.strip():
            raise UserError("the question is empty; ask something about the picture")
        asked = Text(f"Question: {question.strip()} Answer:")
        document = Document((asked, Hole("text"), picture_part(image)))
        return self._written(document, 1, num_docs, max_tokens, temperature, top_p, seed)

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
        if num_images < 1:
            raise UserError(f"num_images is {num_images}; it must be at least 1")
        guidance = make_two_conditions(image_guidance, text_guidance)
        task = Text("Edit first image following the instruction")
        document = self.tokenize(
            Document((task, picture_part(image), Text(instruction.strip()), Hole("image")))
        )
        sampler = make_sampler(temperature, top_p, top_k)
        done = self.complete(
            [document] * num_images,
            seeds=[seed + number for number in range(num_images)],
            strategy=Strategy(guidance, sampler, sampler),
        )
        return self._generations(done, instruction, seed, text_guidance, ())

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

    def save(self, folder: str | os.PathLike) -> None:
        """Writes a model folder that `load` reads, each file whole or not at all."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # The files as they are: a prepared folder knows them by their digests.
        for name in (*FILES, "selection.json", encoder_path(self.checkpoint.folder).name):
            path, temporary = self.checkpoint.folder / name, folder / f"{name}.tmp"
            if path.is_file():
                shutil.copyfile(path, temporary)
                os.replace(temporary, folder / name)
            elif path.is_dir():
                shutil.rmtree(temporary, ignore_errors=True)
                shutil.rmtree(folder / name, ignore_errors=True)
                shutil.copytree(path, temporary)
                os.replace(temporary, folder / name)

    def _written(
        self,
        document: Document,
        place: int,
        num_docs: int,
        max_tokens: int,
        temperature: float,
        top_p: float | None,
        seed: int,
    ) -> Caption:
        """What fills the text hole of a document about a picture."""
        self.checkpoint.check_caption(max_tokens, num_docs)
        document = self.tokenize(document)
        retrieved = self._fitting(document, num_docs, max_tokens)
        (done,) = self.complete(
            [document],
            retrieved=[retrieved],
            seeds=[seed],
            temperature=temperature,
            top_p=top_p,
            max_tokens=max_tokens,
        )
        written = done.parts[place]
        assert isinstance(written, Text)
        return Caption(written.text.strip(), seed, tuple(retrieved))

    def _kept(
        self,
        documents: list[Document],
        prompt: str,
        seed: int,
        guidance: float,
        retrieved: Sequence[Document],
        keep: int | None,
        rank_by: rerank.Ranking,
    ) -> list[Generation]:
        """The pictures for a prompt; with `keep` only so many that fit it best, best first."""
        with jax.set_mesh(self.mesh):
            documents = self._with_pixels(documents)
        generations = self._generations(documents, prompt, seed, guidance, retrieved)
        if keep is None:
            return generations
        if rank_by == "likelihood":
            scores = [self.likelihood(done, part=0) for done in documents]
        else:
            with jax.set_mesh(self.mesh):
                drawn = [np.asarray(generation.image) for generation in generations]
                scores = rerank.by_clip(self.encoder, prompt, drawn).tolist()
        return [generations[place] for place in rerank.best(scores, keep)]

    def _generations(
        self,
        documents: Sequence[Document],
        prompt: str,
        seed: int,
        guidance: float,
        retrieved: Sequence[Document],
    ) -> list[Generation]:
        """The pictures at the ends of documents, drawn with the seeds from `seed` on."""
        generations = []
        for number, done in enumerate(documents):
            picture = done.parts[-1]
            assert isinstance(picture, Image) and picture.pixels is not None
            drawn = PIL.Image.fromarray(picture.pixels)
            generations.append(
                Generation(drawn, prompt, seed + number, guidance, tuple(retrieved), self.name)
            )
        return generations

    def _fitting(self, document: Document, num_docs: int, answer: int) -> list[Document]:
        return self.checkpoint.fitting(self.retrieve(document, num_docs), document, answer)


def picture_part(image: Picture) -> Image:
    """A picture in any of the forms people have it, as a part of a document.

    Raises:
      UserError: it cannot be read.
    """
    if isinstance(image, str | os.PathLike):
        image = pictures.read(image)
    if isinstance(image, PIL.Image.Image):
        image = np.asarray(pictures.on_white(image))
    try:
        return Image(pixels=image)
    except (TypeError, ValueError) as error:
        raise UserError(f"the picture cannot be read: {error}") from error
