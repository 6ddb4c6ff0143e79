"""Converts the class-conditional GPTs of LlamaGen (arXiv 2406.06525) to decoders, and back.

LlamaGen's sequence is the class and then the codes of the image, row by row. Its network is that of
Llama with three differences. Positions are the row and the column of a code. The class has the
cosine 0 and the sine 0, so its query and key are 0 and only its value counts. The head has rows for
the codes only.

The classes become the text tokens of our vocabulary, and the table of classes is appended to that
of codes. The rows of ids that LlamaGen does not have are zeros. No query or key is permuted,
because our decoder can rotate neighbouring pairs, too.

    tok_embeddings, cls_embedding.embedding_table   [codes, d], [classes + 1, d]   table
    layers.N.attention.wqkv                         [q | k | v, d]                 query, key, value
    layers.N.attention.wo                           [d, d]                         out
    layers.N.feed_forward.w1, w3, w2                [f, d], [f, d], [d, f]         gate, fc1, fc2
    layers.N.attention_norm, ffn_norm, norm         [d]                            scales of norms
    output                                          [codes, d]                     head_table
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping

import jax.numpy as jnp
import numpy as np

from leon_jax.config import UserError
from leon_jax.convert.tensor_map import listed
from leon_jax.models.decoder_config import DecoderConfig, Form, layer_weights
from leon_jax.safetensors_format import PartedArray
from leon_jax.tokenizers.template import PromptTemplate
from leon_jax.vocabulary import Vocabulary

FAMILY = "LlamaGen"
CLASSES, CODES = "cls_embedding.embedding_table.weight", "tok_embeddings.weight"
# Name and number of heads of each size, by layers and width. The tensors do not tell the heads. The
# last three sizes have no published weights.
SIZES = {
    (12, 768): ("B", 12), (24, 1024): ("L", 16), (36, 1280): ("XL", 20), (48, 1536): ("XXL", 24),
    (24, 3200): ("3B", 32), (22, 2048): ("1B", 32), (48, 2560): ("XXXL", 40),
    (32, 4096): ("7B", 32),
}  # fmt: skip
# The size of the vocabulary is a multiple of this, so that devices can split it.
_MULTIPLE = 128
_DROPPED = {
    r"freqs_cis": "angles of the rotations, which are computed",
    r"causal_mask": "a buffer of generation",
    r"layers\.\d+\.attention\.kv_cache\.[kv]_cache": "a buffer of generation",
}


@dataclasses.dataclass(frozen=True)
class Converted:
    """A decoder in our layout.

    Attributes:
      config, vocabulary, template: its configuration, its ids, and the layout of its prompts.
      arrays: its arrays by name, which are made while they are written.
      used: the tensors that were converted, by name.
      dropped: names of the other tensors, and why they were dropped.
    """

    config: DecoderConfig
    vocabulary: Vocabulary
    template: PromptTemplate
    arrays: Mapping[str, PartedArray]
    used: Mapping[str, np.ndarray]
    dropped: Mapping[str, str]


def is_gpt(tensors: Mapping[str, np.ndarray]) -> bool:
    """Returns whether tensors are those of a GPT of LlamaGen, with classes or with texts."""
    return CODES in tensors


def read(tensors: Mapping[str, np.ndarray], grid: int, heads: int | None = None) -> Converted:
    """Converts the tensors of a checkpoint.

    Args:
      tensors: the tensors by name.
      grid: rows, and columns, of the codes of an image.
      heads: number of attention heads; None: that of the published size.

    Raises:
      UserError: tensors are missing, unknown, misshaped, not finite or of several dtypes; or the
        number of heads is unknown or does not fit.
    """
    dropped = {
        name: reason
        for name in tensors
        for pattern, reason in _DROPPED.items()
        if re.fullmatch(pattern, name)
    }
    used = {name: tensor for name, tensor in tensors.items() if name not in dropped}
    if any(name.startswith("cls_embedding.cap_proj") for name in used):
        raise UserError(
            "this GPT of LlamaGen draws from features of Flan-T5, which leon_jax does not compute; "
            "take a class-conditional one, such as c2i_B_256.pt"
        )
    config, vocabulary = _read_config(used, grid, heads)
    shapes = {name: shape for each in _layout(config, vocabulary) for name, shape in each.tensors}
    _check(used, shapes)
    arrays = {each.ours: each.to_ours(used) for each in _layout(config, vocabulary)}
    null = vocabulary.text_stop - 1
    return Converted(config, vocabulary, PromptTemplate(FAMILY, (null,)), arrays, used, dropped)


def write(
    config: DecoderConfig, vocabulary: Vocabulary, arrays: Mapping[str, np.ndarray]
) -> dict[str, PartedArray]:
    """Returns the tensors of a decoder under the names of LlamaGen.

    Raises:
      UserError: LlamaGen has no such network.
    """
    expected = _form(config.form.image_columns, vocabulary) if config.form.image_columns else None
    if config.form != expected:
        raise UserError(
            "LlamaGen has no decoder of this form; for the image tokenizer alone, name its "
            "tokenizer.safetensors as --source"
        )
    shapes: dict[str, tuple[int, ...]] = {}
    parts: dict[str, list[np.ndarray]] = {}
    for each in _layout(config, vocabulary):
        shapes |= dict(each.tensors)
        for name, tensor in each.to_theirs(arrays[each.ours]):
            parts.setdefault(name, []).append(tensor)
    # Query, key and value are rows of one tensor, in this order.
    return {
        name: PartedArray(shapes[name], tensors[0].dtype, functools.partial(iter, tensors))
        for name, tensors in parts.items()
    }


def _form(grid: int, vocabulary: Vocabulary) -> Form:
    return Form(
        norm="rms",
        norm_scale=True,
        mlp="swiglu",
        positions="rotary_2d",
        rotary_pairs="interleaved",
        image_columns=grid,
        outside_images="zero",
        tied_head=False,
        head_ids=(vocabulary.image_start, vocabulary.image_stop),
    )


def _read_config(
    tensors: Mapping[str, np.ndarray], grid: int, heads: int | None
) -> tuple[DecoderConfig, Vocabulary]:
    """Returns the configuration and the vocabulary that the shapes imply.

    Raises:
      UserError: a tensor is missing or has another number of axes, or the heads do not fit.
    """

    def shape(name: str) -> tuple[int, int]:
        if name not in tensors:
            raise UserError(f"the checkpoint lacks {name}; it has no class-conditional GPT")
        if tensors[name].ndim != 2:
            raise UserError(
                f"the tensor {name} has the shape {tensors[name].shape}; it needs 2 axes"
            )
        return tensors[name].shape

    (codes, width), (classes, _) = shape(CODES), shape(CLASSES)
    numbers = [int(match[1]) for match in map(_LAYER.match, tensors) if match]
    layers = 1 + max(numbers, default=0)
    fused, _ = shape("layers.0.attention.wqkv.weight")
    if heads is None:
        _, heads = SIZES.get((layers, width), ("", None))
    if heads is None:
        raise UserError(
            f"no published GPT has {layers} layers of width {width}; give the number of its "
            "attention heads as --heads"
        )
    key_heads, rest = divmod(fused - width, 2 * max(width // heads, 1))
    if width % heads or rest or key_heads < 1:
        raise UserError(
            f"--heads={heads} does not fit: the width is {width}, and wqkv has {fused} rows"
        )
    vocabulary = Vocabulary.compact(codes, classes, sentinels=0, multiple=_MULTIPLE)
    config = DecoderConfig(
        vocab_size=vocabulary.size,
        max_length=1 + grid * grid,
        layers=layers,
        embed=width,
        heads=heads,
        mlp=shape("layers.0.feed_forward.w1.weight")[0],
        init_std=0.02,
        kv_heads=None if key_heads == heads else key_heads,
        form=_form(grid, vocabulary),
    )
    return config, vocabulary


_LAYER = re.compile(r"layers\.(\d+)\.")


@dataclasses.dataclass(frozen=True)
class _Array:
    """An array of the decoder and the tensors that it is made of.

    Attributes:
      ours: name of the array.
      shape: its shape.
      tensors: name and shape of each tensor, in order: one for each layer, or the parts of a table.
      to_part: makes the part of the array from a tensor.
      to_tensor: makes the tensor from the part.
      starts: the first row of each part of a table; () for layers. Other rows are zeros.
      fused: the rows of the tensor that the part is made of; None: all rows.
    """

    ours: str
    shape: tuple[int, ...]
    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    to_part: Callable[[np.ndarray], np.ndarray]
    to_tensor: Callable[[np.ndarray], np.ndarray]
    starts: tuple[int, ...] = ()
    fused: slice | None = None

    @property
    def is_stacked(self) -> bool:
        """Whether the first axis is that of layers, with a tensor for each."""
        return self.ours.startswith("blocks.")

    def to_ours(self, tensors: Mapping[str, np.ndarray]) -> PartedArray:
        """Returns the array."""
        dtype = tensors[self.tensors[0][0]].dtype
        return PartedArray(self.shape, dtype, functools.partial(self._parts, tensors, dtype))

    def to_theirs(self, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Yields name and content of each tensor; of a fused one the rows of this array."""
        for number, (name, shape) in enumerate(self.tensors):
            if self.starts:
                yield name, array[self.starts[number] : self.starts[number] + shape[0]]
            else:
                yield name, self.to_tensor(array[number] if self.is_stacked else array)

    def _parts(self, tensors: Mapping[str, np.ndarray], dtype: np.dtype) -> Iterator[np.ndarray]:
        row = 0
        for number, (name, _) in enumerate(self.tensors):
            tensor = tensors[name]
            if self.starts:
                yield np.zeros((self.starts[number] - row, self.shape[1]), dtype)
                row = self.starts[number] + len(tensor)
            yield self.to_part(tensor if self.fused is None else tensor[self.fused])
        if self.starts:
            yield np.zeros((self.shape[0] - row, self.shape[1]), dtype)


def _layout(config: DecoderConfig, vocabulary: Vocabulary) -> list[_Array]:
    """Returns the arrays of a decoder, with the tensors of LlamaGen that they are made of."""
    width, hidden, codes = config.embed, config.mlp, vocabulary.image_codes
    keys = config.key_heads * config.head_dim
    fused = ("attention.wqkv", (width + 2 * keys, width))
    slices = np.split(np.arange(width + 2 * keys), [width, width + keys])
    query, key, value = (slice(int(part[0]), int(part[-1]) + 1) for part in slices)
    sources = {
        "query": (*fused, query),
        "key": (*fused, key),
        "value": (*fused, value),
        "out": ("attention.wo", (width, width), None),
        "gate": ("feed_forward.w1", (hidden, width), None),
        "fc1": ("feed_forward.w3", (hidden, width), None),
        "fc2": ("feed_forward.w2", (width, hidden), None),
        "attention_norm_scale": ("attention_norm", (width,), None),
        "mlp_norm_scale": ("ffn_norm", (width,), None),
    }
    arrays = []
    for name, weight in layer_weights(config).items():
        source, shape, rows = sources[name]
        inputs = int(np.prod(weight.shape[: weight.summed]))
        arrays.append(
            _Array(
                f"blocks.{name}",
                (config.layers, *weight.shape),
                tuple((f"layers.{n}.{source}.weight", shape) for n in range(config.layers)),
                functools.partial(_to_part, weight.shape),
                functools.partial(_to_tensor, inputs),
                fused=rows,
            )
        )

    tables = (CODES, (codes, width)), (CLASSES, (vocabulary.text_tokens, width))
    starts = (vocabulary.image_start, vocabulary.text_start)
    return [
        *arrays,
        _Array("table", (vocabulary.size, width), tables, _same, _same, starts),
        _Array("head_table", (codes, width), (("output.weight", (codes, width)),), _same, _same),
        _Array("final_norm_scale", (width,), (("norm.weight", (width,)),), _same, _same),
    ]


# PyTorch's products are [out, in], ours [*in, *out].
def _to_part(shape: tuple[int, ...], tensor: np.ndarray) -> np.ndarray:
    return tensor.T.reshape(shape)


def _to_tensor(inputs: int, part: np.ndarray) -> np.ndarray:
    return part.reshape(inputs, -1).T if part.ndim > 1 else part


def _same(array: np.ndarray) -> np.ndarray:
    return array


def _check(tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Checks names, shapes, dtypes and numbers of tensors.

    Raises:
      UserError: one is wrong; the message names it.
    """
    if missing := sorted(set(shapes) - set(tensors)):
        raise UserError(f"the checkpoint lacks {listed(missing)}")
    if unknown := sorted(set(tensors) - set(shapes)):
        raise UserError(f"the checkpoint has unknown tensors: {listed(unknown)}")
    dtype = tensors[CODES].dtype
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name]:
            raise UserError(
                f"the tensor {name} has the shape {tensor.shape}; it must be {shapes[name]}"
            )
        if tensor.dtype != dtype or not jnp.issubdtype(dtype, jnp.floating):
            raise UserError(
                f"the tensor {name} is {tensor.dtype} and {CODES} is {dtype}; all must have one "
                "floating-point dtype"
            )
        if not np.isfinite(tensor.astype(np.float32)).all():
            raise UserError(f"{name} has NaN or infinite numbers")
