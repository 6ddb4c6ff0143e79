"""Writes model folders of published models, and checks them: LlamaGen's class-conditional GPTs."""

import dataclasses
import importlib.resources
import json
import pathlib
from collections.abc import Mapping

import jax
import numpy as np
from jaxtyping import Int

from leon_jax import config as configuration
from leon_jax import safetensors_format, sharding, weight_files
from leon_jax.config import UserError, build
from leon_jax.convert import image_tokenizers, llamagen_gpt
from leon_jax.documents import Document, Image, Text
from leon_jax.engine.engine import Engine
from leon_jax.engine.likelihood import log_likelihoods
from leon_jax.engine.sampling_params import SamplingParams
from leon_jax.export.write import versions, write_description
from leon_jax.model_description import ModelDescription, TrainingData
from leon_jax.model_folder import ModelFolder
from leon_jax.models.decoder_config import DecoderConfig
from leon_jax.models.vqgan import VQGANConfig
from leon_jax.tokenizers.class_names import ClassNames
from leon_jax.vocabulary import Vocabulary

# Those of LlamaGen's script sample_c2i.py.
SAMPLING = SamplingParams.of(guidance=4.0, temperature=1.0, top_k=2000)
LICENCE = "MIT"
_IMAGES = 1_281_167  # of ImageNet's training split
_MARGIN = 0.1  # in nats for each code
# The class of the check's drawing.
_CLASS = "barn"
_NOTES = """## Limits

The model draws one image for a class: `--prompt` is a number from 0 to {last} or a name of a class.
It also continues the upper part of an image (`Leon.extend`). It writes no captions, fills no holes
and reads no documents. The terms of access of ImageNet allow research that is not commercial."""


def write_tokenizer(folder: pathlib.Path, converted: image_tokenizers.Converted) -> None:
    """Writes tokenizer.safetensors into a folder."""
    metadata = {
        "format": weight_files.FORMAT,
        "kind": "tokenizer",
        "config": json.dumps(configuration.to_dict(converted.config)),
    }
    safetensors_format.write(folder / "tokenizer.safetensors", converted.arrays, metadata)


def write_folder(
    folder: pathlib.Path,
    gpt: llamagen_gpt.Converted,
    tokenizer: image_tokenizers.Converted,
    sources: Mapping[str, str],
) -> None:
    """Writes the files of a model folder, apart from conversion.json.

    Args:
      folder: a folder with conversion.json.
      gpt: the decoder; its grid is that of `tokenizer`.
      tokenizer: the image tokenizer.
      sources: the files of "decoder" and "tokenizer", for the model card.

    Raises:
      UserError: the image tokenizer and the GPT have different numbers of codes.
    """
    codes, expected = tokenizer.config.codes, gpt.vocabulary.image_codes
    if codes != expected:
        raise UserError(
            f"--vqgan has {codes:,} codes, but the GPT was trained on {expected:,}; name the image "
            "tokenizer that belongs to it"
        )
    grid = tokenizer.config.grid
    header = {
        "model": configuration.to_dict(gpt.config),
        "vocabulary": configuration.to_dict(gpt.vocabulary),
        "image_shape": [grid, grid],
        "template": configuration.to_dict(gpt.template),
    }
    metadata = {
        "format": weight_files.FORMAT, "kind": "decoder", "config": json.dumps(header),
    }  # fmt: skip
    safetensors_format.write(folder / "decoder.safetensors", gpt.arrays, metadata)
    write_tokenizer(folder, tokenizer)
    names = class_names(gpt.vocabulary.text_tokens - 1)
    names.save(folder / "text.json")
    size, _ = llamagen_gpt.SIZES.get((gpt.config.layers, gpt.config.embed), ("", 0))
    data: tuple[TrainingData, ...] = ()
    if any(names.names):
        licences = {"ImageNet terms of access": _IMAGES}
        parts = ("decoder", "tokenizer")
        data = (TrainingData("ImageNet, ILSVRC 2012", parts, "train", _IMAGES, licences),)
    description = ModelDescription(
        title=f"LlamaGen GPT{f'-{size}' if size else ''}, {tokenizer.config.resolution} px",
        prompt=names.decode([min(207, names.size - 1)]).split(",")[0],
        generation={"sampling": SAMPLING.to_dict(), "num_docs": 0, "max_docs": 0},
        licences=(LICENCE,),
        data=data,
        training={part: {"base": source} for part, source in sources.items()},
        versions=versions(),
        notes=_NOTES.format(last=names.size - 1),
    )
    write_description(ModelFolder.open(folder), description)


def class_names(count: int) -> ClassNames:
    """Returns the names of the ImageNet classes, or `count` other classes without names."""
    path = importlib.resources.files("leon_jax") / "convert" / "imagenet_classes.json"
    names = json.loads(path.read_text(encoding="utf-8"))["names"]
    return ClassNames(names if count == len(names) else [""] * count)


def read_folder(
    folder: pathlib.Path,
) -> tuple[dict[str, safetensors_format.PartedArray], dict[str, np.ndarray]]:
    """Returns the tensors of a converted model folder under the names of LlamaGen.

    Returns:
      The tensors of the GPT and those of the image tokenizer, by name.

    Raises:
      UserError: the folder has another model.
    """
    metadata, arrays = weight_files.read_mapped(folder / "decoder.safetensors", "decoder")
    header = json.loads(metadata["config"])
    config = build(DecoderConfig, header["model"], "model")
    vocabulary = build(Vocabulary, header["vocabulary"], "vocabulary")
    gpt = llamagen_gpt.write(config, vocabulary, arrays)
    metadata, arrays = weight_files.read_mapped(folder / "tokenizer.safetensors", "tokenizer")
    network = build(VQGANConfig, json.loads(metadata["config"]), "config")
    return gpt, image_tokenizers.write(image_tokenizers.FAMILIES["llamagen"], network, arrays)


@dataclasses.dataclass(frozen=True)
class CodeLosses:
    """Mean losses of the codes of a test image, in nats for each code.

    Attributes:
      image: of its codes.
      shuffled: of the same codes in a random order.
      chance: of codes that are all equally likely.
    """

    image: float
    shuffled: float
    chance: float

    @property
    def is_plausible(self) -> bool:
        """Whether the decoder knows codes, and their order, by more than random weights do."""
        return self.image < min(self.shuffled, self.chance) - _MARGIN


def code_losses(path: pathlib.Path, codes: Int[np.ndarray, "rows columns"]) -> CodeLosses:
    """Returns the losses of an image of a barn, given its class, if it has a name.

    Args:
      path: the model folder, whose decoder is loaded.
      codes: the codes of the image.
    """
    folder = ModelFolder.open(path)
    tokenizer = folder.tokenizer
    with jax.set_mesh(sharding.make_mesh()):
        engine = Engine(folder.load_decoder(), tokenizer.vocabulary)
    is_named = any(name for name in getattr(tokenizer.text, "names", ()))
    shuffled = np.random.default_rng(0).permutation(codes.ravel()).reshape(codes.shape)
    prompt = (Text(_CLASS),) if is_named else ()
    rows = [
        tokenizer.encode(Document((*prompt, Image(codes=np.asarray(each, np.int32)))))
        for each in (codes, shuffled)
    ]
    image, mixed = -log_likelihoods(engine, rows) / codes.size
    return CodeLosses(float(image), float(mixed), float(np.log(tokenizer.vocabulary.image_codes)))


def describe(gpt: llamagen_gpt.Converted, tokenizer: image_tokenizers.Converted) -> str:
    """Returns one line about a conversion, for the terminal."""
    size, _ = llamagen_gpt.SIZES.get((gpt.config.layers, gpt.config.embed), ("", 0))
    return (
        f"a class-conditional GPT{f'-{size}' if size else ''} of LlamaGen, licence {LICENCE}: "
        f"{gpt.config.parameter_count():,} parameters, {gpt.vocabulary.text_tokens - 1:,} classes, "
        f"{tokenizer.config.resolution} px, {tokenizer.config.grid} x {tokenizer.config.grid} "
        f"codes out of {gpt.vocabulary.image_codes:,}"
    )
