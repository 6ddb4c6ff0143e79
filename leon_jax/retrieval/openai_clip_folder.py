"""Reads OpenAI's CLIP from a folder in the format of transformers.

The files are config.json, model.safetensors (one file or shards), the text tokenizer and
preprocessor_config.json. They give the CLIP module, its tokenizer and its image processor.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from leon_jax.config import UserError, build
from leon_jax.models.clip import (
    CLIP,
    DEVIATION,
    LAYER_NORM_EPSILON,
    MEAN,
    CLIPConfig,
)
from leon_jax.retrieval import convert_openai_clip
from leon_jax.tokenizers.clip_text import CLIPTextTokenizer

CONFIG = "config.json"
# Older folders have the first file. Newer folders have the second, with one group for images.
IMAGE_PROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
ACTIVATIONS = ("quick_gelu", "gelu")
# OpenAI's configs say 2. It means that a text is read at its largest id.
LEGACY_END = 2


@dataclasses.dataclass(frozen=True)
class _Text:
    """The text tower in config.json, with the defaults of missing keys."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407


@dataclasses.dataclass(frozen=True)
class _Vision:
    """The vision tower in config.json, with the defaults of missing keys."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """Resizes and crops an image, exactly as the CLIPImageProcessorPil of transformers.

    Attributes:
      crop_size: side of the square that the network takes, in pixels.
      shortest_edge: pixels of the shorter side after resizing; at least `crop_size`.
      resample: the filter of Pillow.
    """

    crop_size: int
    shortest_edge: int
    resample: PIL.Image.Resampling = PIL.Image.Resampling.BICUBIC

    def __call__(self, pixels: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "size size 3"]:
        """Resizes the image without changing its aspect ratio, and crops the centre."""
        height, width = pixels.shape[:2]
        short = min(height, width)
        # Beyond 1000:1 only the centre is resized: the whole would be hundreds of megabytes.
        if max(height, width) > (longest := 1000 * short):
            top, left = max(0, height - longest) // 2, max(0, width - longest) // 2
            pixels = pixels[top : top + longest, left : left + longest]
            height, width = pixels.shape[:2]
        size = (self.shortest_edge * width // short, self.shortest_edge * height // short)
        resized = PIL.Image.fromarray(pixels).resize(size, self.resample)
        left, top = ((length - self.crop_size) // 2 for length in size)
        return np.asarray(resized.crop((left, top, left + self.crop_size, top + self.crop_size)))


class OpenAICLIP(NamedTuple):
    """A CLIP with its text tokenizer and its image processor."""

    model: CLIP
    text: CLIPTextTokenizer
    image_processor: ImageProcessor


def load(folder: str | os.PathLike) -> OpenAICLIP:
    """Reads a CLIP folder, with the weights as float32. Needs a mesh to be set.

    Raises:
      UserError: a file is missing or damaged, or describes a model that leon_jax cannot compute.
    """
    folder = pathlib.Path(folder)
    config = read_config(folder)
    image_processor = read_image_processor(folder, config.vision.image_size)
    text = CLIPTextTokenizer.load(folder)
    needed = (config.text.start, config.text.end, config.text.vocab_size)
    if (text.start, text.end, text.size) != needed:
        raise UserError(
            f"the tokenizer in {folder} has {text.size} ids, start and end at {text.start} and "
            f"{text.end}; the model needs {config.text.vocab_size} ids, with start and end as the "
            "last two"
        )
    return OpenAICLIP(convert_openai_clip.load(folder, config), text, image_processor)


def read_config(folder: pathlib.Path) -> CLIPConfig:
    """Reads the configuration of the module from config.json.

    Raises:
      UserError: the file is missing, damaged, or describes a model that leon_jax cannot compute.
    """
    path = folder / CONFIG
    values = _read_json(path)
    if values.get("model_type") != "clip":
        raise UserError(
            f"{path} has model_type {values.get('model_type')!r}; a whole CLIP has 'clip'"
        )
    text, vision = _section(_Text, values, "text", path), _section(_Vision, values, "vision", path)
    for key, value, allowed in (
        ("text_config.layer_norm_eps", text.layer_norm_eps, [LAYER_NORM_EPSILON]),
        ("vision_config.layer_norm_eps", vision.layer_norm_eps, [LAYER_NORM_EPSILON]),
        ("text_config.intermediate_size", text.intermediate_size, [4 * text.hidden_size]),
        ("vision_config.intermediate_size", vision.intermediate_size, [4 * vision.hidden_size]),
        ("vision_config.num_channels", vision.num_channels, [3]),
        ("text_config.hidden_act", text.hidden_act, ACTIVATIONS),
        ("vision_config.hidden_act", vision.hidden_act, [text.hidden_act]),
        ("text_config.eos_token_id", text.eos_token_id, [text.vocab_size - 1, LEGACY_END]),
    ):
        if value not in allowed:
            choices = " or ".join(map(repr, allowed))
            raise UserError(f"{path}: {key} is {value!r}, and leon_jax computes only {choices}")
    sizes = {
        "vision": {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "width": vision.hidden_size,
            "layers": vision.num_hidden_layers,
            "heads": vision.num_attention_heads,
        },
        "text": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "width": text.hidden_size,
            "layers": text.num_hidden_layers,
            "heads": text.num_attention_heads,
        },
        "embed_dim": values.get("projection_dim", 512),
        "activation": text.hidden_act,
    }
    return build(CLIPConfig, sizes, str(path))


def read_image_processor(folder: pathlib.Path, image_size: int) -> ImageProcessor:
    """Reads the image processor from preprocessor_config.json; without the file it is OpenAI's.

    Args:
      folder: the CLIP folder.
      image_size: side of the square that the network takes, in pixels.

    Raises:
      UserError: the file is damaged or asks for something other than resizing and cropping.
    """
    path = folder / IMAGE_PROCESSOR
    if path.is_file():
        values = _read_json(path)
    elif (path := folder / PROCESSOR).is_file():
        values = _read_json(path).get("image_processor") or {}
    else:
        return ImageProcessor(image_size, image_size)
    kind = str(values.get("image_processor_type") or values.get("feature_extractor_type", "CLIP"))
    if not kind.startswith("CLIP"):
        raise UserError(f"{path} is for {kind}; leon_jax knows only CLIPImageProcessor")
    for key, needed in (
        ("do_resize", True),
        ("do_center_crop", True),
        ("do_rescale", True),
        ("do_normalize", True),
        ("do_pad", False),
        ("use_square_size", False),
        ("rescale_factor", 1 / 255),
        ("image_mean", list(MEAN)),
        ("image_std", list(DEVIATION)),
    ):
        if values.get(key) not in (None, needed):
            raise UserError(f"{path}: {key} is {values[key]!r}; leon_jax knows only {needed!r}")
    crop, size = values.get("crop_size", image_size), values.get("size", image_size)
    if crop not in (image_size, {"height": image_size, "width": image_size}):
        raise UserError(f"{path}: crop_size is {crop!r}; the network needs {image_size}")
    shortest = size.get("shortest_edge") if isinstance(size, dict) and len(size) == 1 else size
    if not isinstance(shortest, int) or shortest < image_size:
        raise UserError(
            f"{path}: size is {size!r}; it must be the shorter side, {image_size} or more: "
            f'{{"shortest_edge": {image_size}}}'
        )
    try:
        resample = PIL.Image.Resampling(values.get("resample", PIL.Image.Resampling.BICUBIC))
    except ValueError as error:
        raise UserError(
            f"{path}: resample is {values['resample']!r}, which is not a filter of Pillow"
        ) from error
    return ImageProcessor(image_size, shortest, resample)


def _section[T](cls: type[T], values: Mapping[str, Any], name: str, path: pathlib.Path) -> T:
    # Very early folders have a second group, which takes precedence.
    group = values.get(f"{name}_config_dict")
    group = values.get(f"{name}_config", {}) if group is None else group
    if not isinstance(group, Mapping):
        raise UserError(f"{path}: {name}_config is {group!r}; it must be a group of keys")
    known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    return build(cls, {k: v for k, v in group.items() if k in known}, f"{path}: {name}_config")


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        position = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{path} is not JSON (see {position})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a group of keys")
    return values
