"""OpenAI's CLIP from a folder as transformers writes it.

config.json, model.safetensors (whole or in shards), the text tokenizer and preprocessor_config.json
become our CLIP module and what prepares its texts and pictures.
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
from leon_jax.retrieval import openai_weights
from leon_jax.tokenizers.clip_text import CLIPTextTokenizer

CONFIG = "config.json"
# Older folders have the first file, newer ones the second, where it is one group of several.
PICTURES, PROCESSOR = "preprocessor_config.json", "processor_config.json"
ACTIVATIONS = ("quick_gelu", "gelu")
# OpenAI's own configs say 2, and mean that a text is read at its largest id.
LEGACY_END = 2


@dataclasses.dataclass(frozen=True)
class _Text:
    """What config.json says of the text tower; keys that are not there take these values."""

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
    """What config.json says of the vision tower."""

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
class Square:
    """How a picture becomes the network's square, exactly as transformers' CLIPImageProcessorPil.

    Attributes:
      side: of the square, in pixels.
      shorter: the picture's shorter side is resized to this many pixels, at least `side`.
      resample: Pillow's filter.
    """

    side: int
    shorter: int
    resample: PIL.Image.Resampling = PIL.Image.Resampling.BICUBIC

    def __call__(self, pixels: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "side side 3"]:
        """The picture resized with its aspect kept, then its middle."""
        height, width = pixels.shape[:2]
        short = min(height, width)
        # Beyond 1000:1 only the middle is resized: the whole would be hundreds of megabytes.
        if max(height, width) > (longest := 1000 * short):
            top, left = max(0, height - longest) // 2, max(0, width - longest) // 2
            pixels = pixels[top : top + longest, left : left + longest]
            height, width = pixels.shape[:2]
        size = (self.shorter * width // short, self.shorter * height // short)
        resized = PIL.Image.fromarray(pixels).resize(size, self.resample)
        left, top = ((length - self.side) // 2 for length in size)
        return np.asarray(resized.crop((left, top, left + self.side, top + self.side)))


class OpenAICLIP(NamedTuple):
    """A CLIP with what prepares its texts and its pictures."""

    model: CLIP
    text: CLIPTextTokenizer
    square: Square


def load(folder: str | os.PathLike) -> OpenAICLIP:
    """Reads the folder; weights become float32. Needs a mesh to be set.

    Raises:
      UserError: a file is missing or damaged, or describes what the module cannot compute.
    """
    folder = pathlib.Path(folder)
    config = read_config(folder)
    square = read_square(folder, config.vision.image_size)
    text = CLIPTextTokenizer.load(folder)
    last = (config.text.start, config.text.end, config.text.vocab_size)
    if (text.start, text.end, text.size) != last:
        raise UserError(
            f"the tokenizer in {folder} has {text.size} ids, start and end at {text.start} and "
            f"{text.end}; the model needs {last[2]} ids, of which these are the last two"
        )
    return OpenAICLIP(openai_weights.load(folder, config), text, square)


def read_config(folder: pathlib.Path) -> CLIPConfig:
    """The module's configuration, of config.json.

    Raises:
      UserError: the file is missing, damaged, or describes what the module cannot compute.
    """
    path = folder / CONFIG
    values = _read_json(path)
    if values.get("model_type") != "clip":
        raise UserError(
            f"{path} has model_type {values.get('model_type')!r}; a whole CLIP has 'clip'"
        )
    text, vision = _section(_Text, values, "text", path), _section(_Vision, values, "vision", path)
    for key, given, needed in (
        ("text_config.layer_norm_eps", text.layer_norm_eps, [LAYER_NORM_EPSILON]),
        ("vision_config.layer_norm_eps", vision.layer_norm_eps, [LAYER_NORM_EPSILON]),
        ("text_config.intermediate_size", text.intermediate_size, [4 * text.hidden_size]),
        ("vision_config.intermediate_size", vision.intermediate_size, [4 * vision.hidden_size]),
        ("vision_config.num_channels", vision.num_channels, [3]),
        ("text_config.hidden_act", text.hidden_act, ACTIVATIONS),
        ("vision_config.hidden_act", vision.hidden_act, [text.hidden_act]),
        ("text_config.eos_token_id", text.eos_token_id, [text.vocab_size - 1, LEGACY_END]),
    ):
        if given not in needed:
            choices = " or ".join(map(repr, needed))
            raise UserError(f"{path}: {key} is {given!r}, and leon_jax computes only {choices}")
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


def read_square(folder: pathlib.Path, side: int) -> Square:
    """How pictures are prepared, of preprocessor_config.json; OpenAI's way where there is none.

    Raises:
      UserError: the file is damaged or asks for something else than resizing and cropping.
    """
    path = folder / PICTURES
    if path.is_file():
        values = _read_json(path)
    elif (path := folder / PROCESSOR).is_file():
        values = _read_json(path).get("image_processor") or {}
    else:
        return Square(side, side)
    kind = str(values.get("image_processor_type") or values.get("feature_extractor_type", "CLIP"))
    if not kind.startswith("CLIP"):
        raise UserError(f"{path} is of {kind}; CLIPImageProcessor is the one known here")
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
    crop, size = values.get("crop_size", side), values.get("size", side)
    if crop not in (side, {"height": side, "width": side}):
        raise UserError(f"{path}: crop_size is {crop!r}; the network needs {side}")
    shorter = size.get("shortest_edge") if isinstance(size, dict) and len(size) == 1 else size
    if not isinstance(shorter, int) or shorter < side:
        raise UserError(
            f"{path}: size is {size!r}; it must be the shorter side, {side} or more: "
            f'{{"shortest_edge": {side}}}'
        )
    try:
        resample = PIL.Image.Resampling(values.get("resample", PIL.Image.Resampling.BICUBIC))
    except ValueError as error:
        raise UserError(
            f"{path}: resample is {values['resample']!r}, no filter of Pillow"
        ) from error
    return Square(side, shorter, resample)


def _section[T](cls: type[T], values: Mapping[str, Any], name: str, path: pathlib.Path) -> T:
    # Very early folders have a second group, which then holds.
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
        place = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{path} is not JSON (see {place})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a group of keys")
    return values
