"""Reads the weights of OpenAI's CLIP from the format of transformers into the CLIP module.

The tensors of transformers are [out, in], q, k and v are separate, and each layer has its own
tensors. The module has [in, out], one array for q, k and v, and stacked layers.
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

from leon_jax import weight_files
from leon_jax.config import UserError
from leon_jax.models.clip import CLIP, CLIPConfig, create

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True)
class Origin:
    """The tensors that an array of the module is made of.

    Attributes:
      names: names of the tensors, with `{}` for the layer. Several names are q, k and v.
      shape: shape of each tensor.
      layers: number of layers that the array stacks.
      axes: order of the tensor's axes in the module; None: reversed.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    layers: int = 1
    axes: tuple[int, ...] | None = None

    def tensors(self) -> Iterator[list[str]]:
        """Yields the names of the tensors of each layer."""
        for layer in range(self.layers):
            yield [name.format(layer) for name in self.names]


def load(folder: pathlib.Path, config: CLIPConfig) -> CLIP:
    """Reads model.safetensors, or its shards, as float32. Needs a mesh to be set.

    Arrays are read and put on the devices one by one, so the module is never in memory twice.

    Raises:
      UserError: a file is missing or damaged, or a tensor is missing, misshaped or unknown.
    """
    abstract = jax.eval_shape(lambda: create(config, jax.random.key(0)))
    shapes = {name: leaf.shape for name, leaf in weight_files.flatten(abstract).items()}
    with contextlib.ExitStack() as stack:
        files = _open(folder, stack)
        sources = origins(config)
        _check(files, sources.values(), folder)

        def read(name: str) -> np.ndarray:
            array = np.asarray(files[name].get_tensor(name), np.float32)
            weight_files.check_finite(array, name, str(folder))
            return array

        return weight_files.restore(abstract, _Arrays(sources, shapes, read), str(folder))


def origins(config: CLIPConfig) -> dict[str, Origin]:
    """Returns the origin of each array of the module, by the array's dotted path."""
    vision, text = config.vision, config.text
    side, unchanged = vision.patch_size, (0, 1)
    sources = {
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
            axes=unchanged,
        ),
        "tokens": Origin(
            ("text_model.embeddings.token_embedding.weight",),
            (text.vocab_size, text.width),
            axes=unchanged,
        ),
        "token_positions": Origin(
            ("text_model.embeddings.position_embedding.weight",),
            (text.context_length, text.width),
            axes=unchanged,
        ),
        "image_projection": Origin(("visual_projection.weight",), (config.embed_dim, vision.width)),
        "text_projection": Origin(("text_projection.weight",), (config.embed_dim, text.width)),
    }
    for ours, theirs, width in (
        ("vision_before", "vision_model.pre_layrnorm", vision.width),  # misspelt in every file
        ("vision_after", "vision_model.post_layernorm", vision.width),
        ("text_after", "text_model.final_layer_norm", text.width),
    ):
        sources[f"{ours}.scale"] = Origin((f"{theirs}.weight",), (width,))
        sources[f"{ours}.bias"] = Origin((f"{theirs}.bias",), (width,))
    for tower, width, layers in (
        ("vision", vision.width, vision.layers),
        ("text", text.width, text.layers),
    ):
        ours, theirs = f"{tower}_blocks", f"{tower}_model.encoder.layers.{{}}"
        for norm in (1, 2):
            for part, name in (("scale", "weight"), ("bias", "bias")):
                names = (f"{theirs}.layer_norm{norm}.{name}",)
                sources[f"{ours}.norm{norm}.{part}"] = Origin(names, (width,), layers)
        for part, modules, out, into in (
            ("qkv", [f"self_attn.{name}_proj" for name in "qkv"], width, width),
            ("out", ["self_attn.out_proj"], width, width),
            ("fc1", ["mlp.fc1"], 4 * width, width),
            ("fc2", ["mlp.fc2"], width, 4 * width),
        ):
            weights = tuple(f"{theirs}.{module}.weight" for module in modules)
            biases = tuple(f"{theirs}.{module}.bias" for module in modules)
            sources[f"{ours}.{part}"] = Origin(weights, (out, into), layers)
            sources[f"{ours}.{part}_bias"] = Origin(biases, (out,), layers)
    return sources


class _Arrays(Mapping[str, np.ndarray]):
    """The module's arrays by dotted path. An array is read when it is looked up."""

    def __init__(
        self,
        sources: Mapping[str, Origin],
        shapes: Mapping[str, tuple[int, ...]],
        read: Callable[[str], np.ndarray],
    ):
        self._sources, self._shapes, self._read = sources, shapes, read

    def __getitem__(self, name: str) -> np.ndarray:
        origin = self._sources[name]
        layers = []
        for names in origin.tensors():
            tensors = [self._read(tensor).transpose(origin.axes) for tensor in names]
            layers.append(tensors[0] if len(tensors) == 1 else np.stack(tensors, axis=-2))
        # The reshape splits the width into heads.
        return np.stack(layers).reshape(self._shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


def _open(folder: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Opens the files and returns the file of each tensor, by the tensor's name."""
    paths = [folder / WHOLE]
    if not paths[0].is_file():
        if not (folder / INDEX).is_file():
            raise UserError(f"{folder} has no {WHOLE}, the only weight format that leon_jax reads")
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            # Only the file name is used, so that an index cannot point outside its folder.
            shards = {pathlib.PurePath(name).name for name in index["weight_map"].values()}
            paths = [folder / name for name in sorted(shards)]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder / INDEX} does not list the files of the weights") from error
    files = {}
    for path in paths:
        if not path.is_file():
            raise UserError(f"there is no file {path}, which {INDEX} names")
        try:
            file = stack.enter_context(safetensors.safe_open(path, framework="numpy"))
        except Exception as error:  # safetensors raises several types for damaged files
            raise UserError(f"{path} is not a whole safetensors file") from error
        files.update(dict.fromkeys(file.keys(), file))
    return files


def _check(files: Mapping[str, Any], sources: Iterable[Origin], folder: pathlib.Path) -> None:
    shapes = {
        name: origin.shape for origin in sources for names in origin.tensors() for name in names
    }
    # Old files also store the position ids as if they were weights.
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
                f"but config.json requires {list(shape)}"
            )
        if tensor.get_dtype() not in FLOATS:
            raise UserError(
                f"{name} in {folder} is of type {tensor.get_dtype()}; "
                f"it must be one of {', '.join(FLOATS)}"
            )
