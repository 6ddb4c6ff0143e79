"""A loaded model: its folder, engine, image tokenizer and retrieval encoder."""

import dataclasses
import os
from typing import get_args

import jax
import numpy as np

from leon_jax import sharding
from leon_jax.config import UserError
from leon_jax.documents import Document, Image
from leon_jax.engine.engine import Engine
from leon_jax.engine.kv_cache import CacheDtype
from leon_jax.generate.image_metadata import ModelState
from leon_jax.model_folder import ModelFolder, encoder_path, has_encoder
from leon_jax.models.weight_conversion import WeightType, weight_dtype
from leon_jax.retrieval.encoder import RetrievalEncoder
from leon_jax.tokenizers.documents import DocumentTokenizer
from leon_jax.tokenizers.image import ImageTokenizer, to_pixels
from leon_jax.tokenizers.text import TextTokenizer


@dataclasses.dataclass(frozen=True)
class Model:
    """The models of a model folder, loaded on the devices of a mesh.

    Attributes:
      folder: the model folder.
      engine: the engine that runs the decoder.
      image_tokenizer: converts pixels to codes and back.
      encoder: the retrieval encoder; it embeds prompts for retrieval and ranks images. None: the
        folder has none, because its decoder reads no documents.
      mesh: the device mesh.

    Raises:
      UserError: the image tokenizer and the decoder differ in the shape of an image's codes or in
        the number of codebook entries.
    """

    folder: ModelFolder
    engine: Engine
    image_tokenizer: ImageTokenizer
    encoder: RetrievalEncoder | None
    mesh: jax.sharding.Mesh

    def __post_init__(self):
        codes = self.image_tokenizer.shape, self.image_tokenizer.codes
        expected = self.tokenizer.image_shape, self.tokenizer.vocabulary.image_codes
        if codes != expected:
            raise UserError(
                f"tokenizer.safetensors in {self.folder.path} makes images of {codes[0]} codes out "
                f"of {codes[1]}, but the decoder reads {expected[0]} out of {expected[1]}"
            )

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike | ModelFolder | None = None,
        weights: WeightType = "float32",
        cache: CacheDtype = "compute",
    ) -> "Model":
        """Loads a model folder onto the current mesh or, if none is set, a mesh over all devices.

        Args:
          folder: the model folder; None: the shipped model.
          weights: dtype of the decoder's weights: "float32", "bfloat16" or "int8".
          cache: dtype of the KV cache: "compute" (the decoder's compute dtype) or "int8".

        Raises:
          UserError: a file is missing or damaged, the files do not belong together, or a dtype is
            unknown.
        """
        for name, value, kinds in (
            ("weights", weights, get_args(WeightType)),
            ("cache", cache, get_args(CacheDtype)),
        ):
            if value not in kinds:
                raise UserError(f"{name} is {value!r}; it must be one of {', '.join(kinds)}")
        folder = folder if isinstance(folder, ModelFolder) else ModelFolder.open(folder)
        mesh, tokenizer = sharding.current_mesh(), folder.tokenizer
        with jax.set_mesh(mesh):
            engine = Engine(
                folder.load_decoder(weights), tokenizer.vocabulary,
                text_size=tokenizer.text.size, cache_dtype=cache,
            )  # fmt: skip
            image_tokenizer = ImageTokenizer.load(folder.path / "tokenizer.safetensors")
            encoder = None
            if has_encoder(folder.path):
                text = tokenizer.text if isinstance(tokenizer.text, TextTokenizer) else None
                encoder = RetrievalEncoder.load(encoder_path(folder.path), text, batch_size=8)
        return cls(folder, engine, image_tokenizer, encoder, mesh)

    @property
    def tokenizer(self) -> DocumentTokenizer:
        """The document tokenizer, which converts documents to ids and back."""
        return self.folder.tokenizer

    @property
    def retrieval_encoder(self) -> RetrievalEncoder:
        """The retrieval encoder.

        Raises:
          UserError: the folder has none.
        """
        if self.encoder is None:
            raise UserError(
                f"the model folder {self.folder.path} has no retrieval encoder; copy a CLIP as "
                "transformers writes it into its folder encoder to rank images with it"
            )
        return self.encoder

    @property
    def state(self) -> ModelState:
        """The properties of the model that a generated image depends on."""
        return ModelState(
            self.folder.name, self.folder.digest, weight_dtype(self.engine.decoder),
            self.engine.cache_dtype,
        )  # fmt: skip

    def encode_images(self, document: Document) -> Document:
        """Returns the document with codes added to each image that has only pixels."""
        for index, part in enumerate(document.parts):
            if isinstance(part, Image) and part.codes is None and part.pixels is not None:
                pixels = self.image_tokenizer.preprocess(part.pixels)
                with jax.set_mesh(self.mesh):
                    codes = np.asarray(self.image_tokenizer.encode(pixels[None])[0], np.int32)
                document = document.replace(index, Image(part.pixels, codes))
        return document

    def decode_images(self, documents: list[Document]) -> list[Document]:
        """Returns the documents with pixels added to each image that has only codes."""
        missing = [
            (number, index, part.codes)
            for number, document in enumerate(documents)
            for index, part in enumerate(document.parts)
            if isinstance(part, Image) and part.pixels is None and part.codes is not None
        ]
        if not missing:
            return documents
        with jax.set_mesh(self.mesh):
            codes = np.stack([codes for _, _, codes in missing])
            decoded = to_pixels(self.image_tokenizer.decode(codes))
        documents = list(documents)
        for (number, index, part_codes), pixels in zip(missing, decoded, strict=True):
            documents[number] = documents[number].replace(index, Image(pixels, part_codes))
        return documents
