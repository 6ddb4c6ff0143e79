"""Leon: the few calls a person makes.

    leon = Leon.load()
    leon.generate("cat face, Twemoji style", num_images=4)[0].image
    leon.caption("cat.png").text

Everything is completion of documents underneath: `complete` fills any holes of any document.
"""

import os
import pathlib
import shutil
from typing import get_args

import jax
from flax import nnx

from leon_jax import weight_files
from leon_jax.config import UserError
from leon_jax.decode.cache import CacheType
from leon_jax.decode.checkpoint import CAPTION_TOKENS, FILES, Checkpoint, encoder_path, model_folder
from leon_jax.decode.completer import current_mesh
from leon_jax.decode.drawer import Drawer
from leon_jax.decode.inputs import Picture, picture_part, text_part
from leon_jax.decode.library import find
from leon_jax.decode.results import Caption, Generation, credit
from leon_jax.documents import Document, Hole, Text
from leon_jax.models.decoder import Decoder
from leon_jax.models.inference_weights import WeightType, convert_weights, unstack
from leon_jax.retrieval.encoder import Encoder
from leon_jax.tokenizers.image import ImageTokenizer

__all__ = ["Caption", "Generation", "Leon", "Picture", "credit", "model_folder"]


class Leon(Drawer):
    """A model with everything it needs to answer. Make one with `Leon.load`."""

    @classmethod
    def load(
        cls,
        checkpoint: str | os.PathLike | None = None,
        index: str | os.PathLike | None = None,
        weights: WeightType = "float32",
        cache: CacheType = "compute",
    ) -> "Leon":
        """Reads a model folder.

        Args:
          checkpoint: decoder.safetensors, tokenizer.safetensors, text.json, and
            encoder.safetensors or a folder `encoder` with OpenAI's CLIP; None: the model that
            comes with the package.
          index: the prepared folder to retrieve from; None: one is found, or made when it is first
            needed (see `leon_jax.decode.library.find`).
          weights: what the decoder's weights are kept in: "float32", "bfloat16" or "int8" (see
            `leon_jax.models.inference_weights.convert_weights`).
          cache: what keys and values are kept in: the decoder's "compute" dtype, or "int8".

        Raises:
          UserError: a file is missing or damaged, the files do not belong together, or there is no
            such type.
        """
        for name, given, kinds in (
            ("weights", weights, get_args(WeightType)),
            ("cache", cache, get_args(CacheType)),
        ):
            if given not in kinds:
                raise UserError(f"{name} is {given!r}; it must be one of {', '.join(kinds)}")
        found = Checkpoint.open(model_folder(checkpoint))
        if index is not None:
            find(found.folder, index)
        path = found.folder / "decoder.safetensors"
        mesh = current_mesh()
        with jax.set_mesh(mesh):
            arrays, _ = weight_files.load(path, "decoder")
            abstract = jax.eval_shape(lambda: Decoder(found.config, rngs=nnx.Rngs(0)))
            decoder = weight_files.restore(abstract, arrays, str(path))
            if weights != "float32":
                decoder = jax.jit(lambda model: convert_weights(model, weights))(decoder)
            decoder = unstack(decoder)
            tokenizer = ImageTokenizer.load(found.folder / "tokenizer.safetensors")
            text = found.documents.text
            encoder = Encoder.load(encoder_path(found.folder), text, batch_size=8)
        return cls(found, decoder, tokenizer, encoder, index, mesh, cache)

    def caption(
        self,
        image: Picture,
        num_docs: int = 0,
        max_tokens: int = CAPTION_TOKENS,
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int = 0,
    ) -> Caption:
        """Writes a caption for a picture: the text before it is infilled.

        Args:
          image: a file, a PIL picture, or sRGB uint8[height, width, 3].
          num_docs: how many documents to retrieve and read first, at most.
          max_tokens: where a caption is cut.
          temperature: 0 writes the most likely caption, token by token.
          top_p, top_k: see `leon_jax.decode.sampling.make_sampler`.
          seed: decides the caption if the temperature is above 0.

        Raises:
          UserError: the file is no picture that can be read, or an argument is out of range.
        """
        document = Document((Hole("text"), picture_part(image)))
        return self._written(document, 0, num_docs, max_tokens, temperature, top_p, top_k, seed)

    def answer(
        self,
        image: Picture,
        question: str,
        num_docs: int = 0,
        max_tokens: int = CAPTION_TOKENS,
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int = 0,
    ) -> Caption:
        """Answers a question about a picture: the text after the question is infilled.

        The question stands before the picture, as in CM3Leon's instructions (table 5). The demo
        model has seen none, so what it writes is a caption at best.

        Args:
          image: a file, a PIL picture, or sRGB uint8[height, width, 3].
          question: any text.
          num_docs, max_tokens, temperature, top_p, top_k, seed: see `caption`.

        Raises:
          UserError: see `caption`; or the question is empty or too long.
        """
        if not question.strip():
            raise UserError("the question is empty; ask something about the picture")
        asked = text_part("question", f"Question: {question.strip()} Answer:")
        document = Document((asked, Hole("text"), picture_part(image)))
        return self._written(document, 1, num_docs, max_tokens, temperature, top_p, top_k, seed)

    def save(self, folder: str | os.PathLike) -> None:
        """Copies the model folder to one that `load` reads, each file whole or not at all.

        Weights are copied as they were read, whatever they are kept in now. Into the model's own
        folder nothing is written.
        """
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if folder.samefile(self.checkpoint.folder):
            return
        # The files as they are: a prepared folder knows them by their digests.
        for name in (*FILES, "selection.json", encoder_path(self.checkpoint.folder).name):
            path, temporary = self.checkpoint.folder / name, folder / f"{name}.tmp"
            if path.is_file():
                shutil.copyfile(path, temporary)
                os.replace(temporary, folder / name)
            elif path.is_dir():
                shutil.rmtree(temporary, ignore_errors=True)
                shutil.copytree(path, temporary)
                shutil.rmtree(folder / name, ignore_errors=True)
                os.replace(temporary, folder / name)

    def _written(
        self,
        document: Document,
        place: int,
        num_docs: int,
        max_tokens: int,
        temperature: float,
        top_p: float | None,
        top_k: int | None,
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
            top_k=top_k,
            max_tokens=max_tokens,
        )
        written = done.parts[place]
        assert isinstance(written, Text)
        return Caption(written.text.strip(), seed, tuple(retrieved))
