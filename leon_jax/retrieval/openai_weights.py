"""The weights of OpenAI's CLIP as transformers stores them, laid out as our module wants them.

There matrices are [out, in], q, k and v are apart, and every layer has tensors of its own.
"""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import safetensors

from leon_jax import model_files
from leon_jax.config import UserError
from leon_jax.models.clip import CLIP, CLIPConfig, create

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where an array of the module is found.

    Attributes:
      names: of the tensors; `{}` stands for the layer, and several are q, k and v.
      shape: of each of them.
      layers: of how many layers the array is a stack.
      axes: the order of a tensor's axes in the module; None: reversed.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    layers: int = 1
    axes: tuple[int, ...] | None = None

    def tensors(self) -> Iterator[list[str]]:
        """The names of each layer's tensors."""
        for layer in range(self.layers):
            yield [name.format(layer) for name in self.names]


def load(folder: pathlib.Path, config: CLIPConfig) -> CLIP:
    """Reads model.safetensors, or its shards, as float32. Needs a mesh to be set.

    Arrays are read and laid out one by one, so the module is never in memory twice.

    Raises:
      UserError: a file is missing or damaged, or a tensor is missing, misshaped or unknown.
    """
    abstract = jax.eval_shape(lambda: create(config, jax.random.key(0)))
    shapes = {name: leaf.shape for name, leaf in model_files.flatten(abstract).items()}
    with contextlib.ExitStack() as stack:
        files = _open(folder, stack)
        found = origins(config)
        _check(files, found.values(), folder)

        def read(name: str) -> np.ndarray:
            return np.asarray(files[name].get_tensor(name), np.float32)

        return model_files.restore(abstract, _Arrays(found, shapes, read), str(folder))


def origins(config: CLIPConfig) -> dict[str, Origin]:
    """Where each array of the module is found, by its dotted path."""
    vision, text = config.vision, config.text
    side, as_it_is = vision.patch_size, (0, 1)
    found = {
        "logit_scale": Origin(("logit_scale",), ()),
        "stem.kernel": Origin(
            ("vision_model.embeddings.patch_embedding.weight",),
            (vision.width, 3, side, side),
            axes=(2, 3, 1, 0),
        ),
        "class_token": Origin(("vision_model.embeddings.class_embedding",), (vision.width,)),
        "patch_positions": Origin(
            ("vision_model.embeddings.position_embedding.weight",),
            (vision.patches + 1, vision.width),
            axes=as_it_is,
        ),
        "tokens": Origin(
            ("text_model.embeddings.token_embedding.weight",),
            (text.vocab_size, text.width),
            axes=as_it_is,
        ),
        "token_positions": Origin(
            ("text_model.embeddings.position_embedding.weight",),
            (text.context_length, text.width),
            axes=as_it_is,
        ),
        "image_projection": Origin(("visual_projection.weight",), (config.embed_dim, vision.width)),
        "text_projection": Origin(("text_projection.weight",), (config.embed_dim, text.width)),
    }
    for ours, theirs, width in (
        ("vision_before", "vision_model.pre_layrnorm", vision.width),  # misspelt in every file
        ("vision_after", "vision_model.post_layernorm", vision.width),
        ("text_after", "text_model.final_layer_norm", text.width),
    ):
        found[f"{ours}.scale"] = Origin((f"{theirs}.weight",), (width,))
        found[f"{ours}.bias"] = Origin((f"{theirs}.bias",), (width,))
    for tower, width, layers in (
        ("vision", vision.width, vision.layers),
        ("text", text.width, text.layers),
    ):
        ours, theirs = f"{tower}_blocks", f"{tower}_model.encoder.layers.{{}}"
        for norm in (1, 2):
            for part, name in (("scale", "weight"), ("bias", "bias")):
                names = (f"{theirs}.layer_norm{norm}.{name}",)
                found[f"{ours}.norm{norm}.{part}"] = Origin(names, (width,), layers)
        for part, modules, out, into in (
            ("qkv", [f"self_attn.{name}_proj" for name in "qkv"], width, width),
            ("out", ["self_attn.out_proj"], width, width),
            ("fc1", ["mlp.fc1"], 4 * width, width),
            ("fc2", ["mlp.fc2"], width, 4 * width),
        ):
            weights = tuple(f"{theirs}.{module}.weight" for module in modules)
            biases = tuple(f"{theirs}.{module}.bias" for module in modules)
            found[f"{ours}.{part}"] = Origin(weights, (out, into), layers)
            found[f"{ours}.{part}_bias"] = Origin(biases, (out,), layers)
    return found


class _Arrays(Mapping[str, np.ndarray]):
    """The module's arrays by dotted path, each read and laid out when it is asked for."""

    def __init__(
        self,
        found: Mapping[str, Origin],
        shapes: Mapping[str, tuple[int, ...]],
        read: Callable[[str], np.ndarray],
    ):
        self._found, self._shapes, self._read = found, shapes, read

    def __getitem__(self, name: str) -> np.ndarray:
        origin = self._found[name]
        layers = []
        for names in origin.tensors():
            parts = [self._read(each).transpose(origin.axes) for each in names]
            layers.append(parts[0] if len(parts) == 1 else np.stack(parts, axis=-2))
        # What is left to do is to cut the width into heads.
        return np.stack(layers).reshape(self._shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def _open(folder: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """The open file of every tensor, by the tensor's name."""
    paths = [folder / WHOLE]
    if not paths[0].is_file():
        if not (folder / INDEX).is_file():
            raise UserError(f"{folder} has no {WHOLE}, the only format of weights read here")
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            # Names only: an index does not lead out of its folder.
            shards = {pathlib.PurePath(name).name for name in index["weight_map"].values()}
            paths = [folder / name for name in sorted(shards)]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder / INDEX} does not say which files there are") from error
    files = {}
    for path in paths:
        if not path.is_file():
            raise UserError(f"there is no {path}, which {INDEX} names")
        try:
            file = stack.enter_context(safetensors.safe_open(path, framework="numpy"))
        except Exception as error:  # the library raises several kinds for damaged files
            raise UserError(f"{path} is not a whole safetensors file") from error
        files.update(dict.fromkeys(file.keys(), file))
    return files


def _check(files: Mapping[str, Any], found: Iterable[Origin], folder: pathlib.Path) -> None:
    shapes = {
        name: origin.shape for origin in found for names in origin.tensors() for name in names
    }
    # Old files also keep the numbers of the positions, as if they were weights.
    stored = {name for name in files if not name.endswith(".embeddings.position_ids")}
    for problem, names in (
        ("lacks the tensor", shapes.keys() - stored),
        ("holds a tensor that is not CLIP's,", stored - shapes.keys()),
    ):
        if names:
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"the model in {folder} {problem} {min(names)}{others}")
    for name, shape in shapes.items():
        tensor = files[name].get_slice(name)
        if tuple(tensor.get_shape()) != shape:
            raise UserError(
                f"{name} in {folder} has the shape {list(tensor.get_shape())}, "
                f"but by config.json it is {list(shape)}"
            )
        if tensor.get_dtype() not in FLOATS:
            raise UserError(
                f"{name} in {folder} is of type {tensor.get_dtype()}; "
                f"it must be one of {', '.join(FLOATS)}"
            )
