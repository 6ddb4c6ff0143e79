"""Leon: the few calls a person makes.

    leon = Leon.load()
    leon.generate("cat face, Twemoji style", num_images=4)[0].image
    leon.caption("cat.png").text

Everything is completion of documents underneath: `complete` fills any holes of any document.
"""

import os
import pathlib
import shutil
from collections.abc import Sequence

import jax
import numpy as np
import PIL.Image
from flax import nnx
from jaxtyping import UInt8
from tqdm import tqdm

from leon_jax import __version__, model_files, sharding
from leon_jax.config import UserError, to_dict
from leon_jax.data import pictures
from leon_jax.decode.checkpoint import CAPTION_TOKENS, FILES, Checkpoint, encoder_path, model_folder
from leon_jax.decode.complete import Request, Settings, complete
from leon_jax.decode.engine import Engine
from leon_jax.decode.guidance import make_guidance
from leon_jax.decode.library import Library, find
from leon_jax.decode.results import Caption, Generation, credit
from leon_jax.decode.sampling import make_sampler
from leon_jax.documents import Document, Hole, Image, Text
from leon_jax.models.decoder import Decoder
from leon_jax.retrieval.encoder import Encoder
from leon_jax.tokenizers.image import ImageTokenizer, to_pixels

Picture = str | os.PathLike | PIL.Image.Image | UInt8[np.ndarray, "height width 3"]

__all__ = ["Caption", "Generation", "Leon", "Picture", "credit", "model_folder"]

# Requests that are decoded side by side.
BATCH = 16


class Leon:
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
        self.checkpoint, self.decoder = checkpoint, decoder
        self.image_tokenizer, self.encoder = image_tokenizer, encoder
        self.mesh = mesh or _mesh()
        self.engine = Engine(decoder, checkpoint.documents.vocabulary)
        self._index = index
        self._library: Library | None = None
        if image_tokenizer.shape != checkpoint.documents.image_shape:
            raise UserError(
                f"tokenizer.safetensors in {checkpoint.folder} makes {image_tokenizer.shape} codes "
                f"a picture, but the decoder reads {checkpoint.documents.image_shape}"
            )

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
        mesh = _mesh()
        with jax.set_mesh(mesh):
            arrays, _ = model_files.load(path, "decoder")
            abstract = jax.eval_shape(lambda: Decoder(found.config, rngs=nnx.Rngs(0)))
            decoder = model_files.restore(abstract, arrays, str(path))
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
    ) -> list[Generation]:
        """Draws pictures for a prompt.

        Args:
          prompt: what to show; the demo model's captions read "cat face, Twemoji style".
          num_images: how many pictures; they get the seeds `seed`, `seed` + 1, ...
          num_docs: how many documents to retrieve and read first, at most.
          guidance: classifier-free guidance weight; 1 is none.
          temperature, top_p, top_k: see `leon_jax.decode.sampling.make_sampler`.
          seed: decides the pictures, 0 or more.

        Raises:
          UserError: an argument is out of range, or the prompt does not fit.
        """
        self.checkpoint.check_prompt(prompt, num_docs)
        if num_images < 1:
            raise UserError(f"num_images is {num_images}; it must be at least 1")
        document = Document((Text(prompt), Hole("image")))
        retrieved = self._fitting(document, num_docs, self.checkpoint.documents.image_tokens)
        documents = self.complete(
            [document] * num_images,
            retrieved=[retrieved] * num_images,
            seeds=[seed + number for number in range(num_images)],
            guidance=guidance,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
        )
        generations = []
        for number, done in enumerate(documents):
            picture = done.parts[-1]
            assert isinstance(picture, Image) and picture.pixels is not None
            drawn = PIL.Image.fromarray(picture.pixels)
            generations.append(
                Generation(drawn, prompt, seed + number, guidance, tuple(retrieved), self.name)
            )
        return generations

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
        self.checkpoint.check_caption(max_tokens, num_docs)
        document = self.tokenize(Document((Hole("text"), picture_part(image))))
        retrieved = self._fitting(document, num_docs, max_tokens)
        (done,) = self.complete(
            [document],
            retrieved=[retrieved],
            seeds=[seed],
            temperature=temperature,
            top_p=top_p,
            max_tokens=max_tokens,
        )
        written = done.parts[0]
        assert isinstance(written, Text)
        return Caption(written.text.strip(), seed, tuple(retrieved))

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

        Returns:
          Documents without holes; pictures that filled one hold pixels and codes.

        Raises:
          UserError: a document does not fit the context, or an argument is out of range.
        """
        documents = [documents] if isinstance(documents, Document) else list(documents)
        seeds = list(range(len(documents))) if seeds is None else list(seeds)
        if any(seed < 0 for seed in seeds):
            raise UserError(f"seed is {min(seeds)}; it must be 0 or more")
        sampler = make_sampler(temperature, top_p, top_k)
        settings = Settings(make_guidance(guidance), sampler, sampler, max_tokens)
        read = [()] * len(documents) if retrieved is None else [tuple(each) for each in retrieved]
        requests = [
            Request(self.tokenize(document), documents_read, seed)
            for document, documents_read, seed in zip(documents, read, seeds, strict=True)
        ]
        done = []
        bar = tqdm(total=len(requests), unit="doc", disable=len(requests) <= BATCH, leave=False)
        with jax.set_mesh(self.mesh), bar:
            for start in range(0, len(requests), BATCH):
                batch = requests[start : start + BATCH]
                done += complete(self.engine, self.checkpoint.documents, batch, settings)
                bar.update(len(batch))
            return self._with_pixels(done)

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

    def tokenize(self, document: Document) -> Document:
        """The document with codes beside the pixels of every picture."""
        for place, part in enumerate(document.parts):
            if isinstance(part, Image) and part.codes is None and part.pixels is not None:
                pixels = self.image_tokenizer.preprocess(part.pixels)
                with jax.set_mesh(self.mesh):
                    codes = self.image_tokenizer.encode(pixels[None])[0]
                document = document.replace(place, Image(part.pixels, np.asarray(codes, np.int32)))
        return document

    def save(self, folder: str | os.PathLike) -> None:
        """Writes a model folder that `load` reads, each file whole or not at all."""
        folder, documents = pathlib.Path(folder), self.checkpoint.documents
        header = {
            "model": to_dict(self.checkpoint.config),
            "vocabulary": to_dict(documents.vocabulary),
            "image_shape": list(documents.image_shape),
        }
        model_files.save(folder / "decoder.safetensors", self.decoder, "decoder", header)
        # The other files as they are: a prepared folder knows them by their digests.
        for name in (*FILES[1:], "selection.json", encoder_path(self.checkpoint.folder).name):
            path, temporary = self.checkpoint.folder / name, folder / f"{name}.tmp"
            if path.is_file():
                shutil.copyfile(path, temporary)
                os.replace(temporary, folder / name)
            elif path.is_dir():
                shutil.rmtree(temporary, ignore_errors=True)
                shutil.rmtree(folder / name, ignore_errors=True)
                shutil.copytree(path, temporary)
                os.replace(temporary, folder / name)

    def _fitting(self, document: Document, num_docs: int, answer: int) -> list[Document]:
        return self.checkpoint.fitting(self.retrieve(document, num_docs), document, answer)

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


def _mesh() -> jax.sharding.Mesh:
    """The mesh that is set, or one over all devices."""
    current = jax.sharding.get_mesh()
    return sharding.make_mesh() if current.empty else current
