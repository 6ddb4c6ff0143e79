"""The configuration of the decoder: its sizes, its form, and the weights that follow from them.

A form says what a layer is made of. The default is the form of CM3Leon. Some other published
decoders:

    Llama      Form(norm="rms", norm_scale=True, mlp="swiglu", positions="rotary", tied_head=False)
    Chameleon  the same with qk_norm="layer", qk_norm_by_head=True; the one of 34B parameters also
               has norm_place="post"
    Qwen2      Llama's with qkv_bias=True
    LlamaGen   Llama's with positions="rotary_2d", rotary_pairs="interleaved",
               outside_images="zero", and the image codes as head_ids

Letters: E embed, F mlp, V vocab, T length.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple

from leon_jax.config import UserError
from leon_jax.ops.attention import Implementation
from leon_jax.ops.norm import NormKind
from leon_jax.ops.products import Products
from leon_jax.ops.rotary import OutsideImages, Pairs

# The embedding row that starts as zeros: `leon_jax.vocabulary.Vocabulary.pad`.
PAD = 1


@dataclasses.dataclass(frozen=True)
class Form:
    """What a layer of the decoder is made of. The defaults are CM3Leon's.

    Attributes:
      norm: layer norm ("layer") or RMS norm ("rms").
      norm_scale, norm_bias: norms have a scale, a bias for each dimension.
      norm_epsilon: is added to the mean square in every norm.
      norm_place: the input of attention and of the MLP is normed ("pre"), or their result, before
        it is added to the residual stream ("post", as in Swin Transformer v2). The final norm is
        always there.
      qk_norm: the norm of each query and key over the dimensions of a head. "layer" has a scale
        and a bias, "rms" a scale.
      qk_norm_by_head: each head has its own scale and bias of `qk_norm`, as in Chameleon.
        Otherwise all heads share them.
      qkv_bias, out_bias, mlp_bias: the products of queries, keys and values, of the attention's
        result, and of the MLP have biases.
      mlp: the hidden layer of the MLP: relu(x fc1), gelu(x fc1), or silu(x gate) * (x fc1)
        ("swiglu", Shazeer 2020).
      positions: a table of learned positions is added to the embeddings ("learned"), or queries
        and keys are rotated by their position in the sequence ("rotary") or, inside images, half
        by their row and half by their column ("rotary_2d", `leon_jax.ops.rotary.grid_rotation`).
      rotary_base: base of the rates of rotation.
      rotary_pairs: which numbers of a head are rotated together; see `leon_jax.ops.rotary.Pairs`.
      image_columns: tokens in a row of an image, for "rotary_2d".
      outside_images: rotation of the other tokens, for "rotary_2d".
      tied_head: the output head is the embedding table. Otherwise it has weights of its own.
      head_ids: the first id that an untied head has a row for, and one past the last such id.
        The decoder never predicts another id. None: the head has a row for every id.
      embed_scale: factor of the token embeddings.

    Raises:
      UserError: a number is out of range, "rotary_2d" has no `image_columns`, or a tied head has
        `head_ids`.
    """

    norm: NormKind = "layer"
    norm_scale: bool = False
    norm_bias: bool = False
    norm_epsilon: float = 1e-5
    norm_place: Literal["pre", "post"] = "pre"
    qk_norm: Literal["none", "layer", "rms"] = "none"
    qk_norm_by_head: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    mlp: Literal["relu", "gelu", "swiglu"] = "relu"
    positions: Literal["learned", "rotary", "rotary_2d"] = "learned"
    rotary_base: float = 10_000.0
    rotary_pairs: Pairs = "half_split"
    image_columns: int = 0
    outside_images: OutsideImages = "sequence"
    tied_head: bool = True
    head_ids: tuple[int, int] | None = None
    embed_scale: float = 1.0

    # So the files of models without this key do not change.
    OMITTED_DEFAULTS: ClassVar[tuple[str, ...]] = ("head_ids",)

    def __post_init__(self):
        for name in ("norm_epsilon", "rotary_base"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.positions == "rotary_2d" and self.image_columns < 1:
            raise UserError(
                f"image_columns is {self.image_columns}; rotary_2d needs the number of tokens in a "
                "row of an image"
            )
        if self.head_ids is not None and (self.tied_head or len(self.head_ids) != 2):
            raise UserError(
                f"head_ids is {self.head_ids}; it must be (first, stop), with tied_head=False"
            )


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and options of a decoder.

    Attributes:
      vocab_size: rows of the embedding table; `leon_jax.vocabulary.Vocabulary.size`.
      max_length: longest sequence; rows of the table of learned positions.
      layers: number of layers.
      embed: width of the model.
      heads: number of attention heads.
      mlp: hidden width of the MLP.
      dtype: compute dtype. The weights are float32.
      products: dtype of the operands of the products in training and likelihoods: "dtype",
        "bfloat16" with float32 sums, or "auto" (see `leon_jax.ops.products.operand_dtype`).
      remat: what the backward pass recomputes inside a layer: nothing ("none"), everything except
        the products with weights ("dots"), everything except the attention's result
        ("attention"), everything except both ("dots_and_attention"), or everything ("full").
      attention: the implementation (see `leon_jax.ops.attention`); "auto" depends on the platform.
      init_std: initial sd of the weights, which are truncated normals.
      position_std: initial sd of learned positions.
      position_init: initial learned positions: truncated normals ("normal", as in the paper) or
        sinusoids with wavelengths from 2 pi to 2 pi `max_length` (Vaswani et al. 2017, section 3.5,
        with `max_length` instead of 10,000). Both are trained. With sinusoids, "one row up" in an
        image is a rotation from the start, which saves a small model much of its training.
      part_step: every part of a document starts at a multiple of this many positions (see
        `leon_jax.vocabulary.Vocabulary.positions`). 1, as in the paper: positions have no gaps.
        With a step, a small model can attend to the same position in the retrieved image with one
        attention head. Without a step, the distance varies with the lengths of the captions.
      kv_heads: number of heads of keys and values; heads / kv_heads neighbouring heads of queries
        share one (Ainslie et al. 2023, arXiv 2305.13245). None: as many as `heads`.
      form: what a layer is made of.

    Raises:
      UserError: a size is below 1, `embed` is not a multiple of `heads`, `heads` is not a multiple
        of `kv_heads`, `embed` is odd with sinusoids, a head is too small for its rotation, or
        `form.head_ids` are no range of ids.
    """

    vocab_size: int
    max_length: int
    layers: int
    embed: int
    heads: int
    mlp: int
    dtype: Literal["float32", "bfloat16"] = "float32"
    products: Products = "dtype"
    remat: Literal["none", "dots_and_attention", "dots", "attention", "full"] = "none"
    attention: Implementation = "auto"
    init_std: float = 0.006
    position_std: float = 0.0002
    position_init: Literal["normal", "sinusoids"] = "normal"
    part_step: int = 1
    kv_heads: int | None = None
    form: Form = Form()

    FORMER_KEYS: ClassVar[Mapping[str, int]] = {"pad_id": PAD}
    # So the files of a model in the form of CM3Leon are those of versions without these keys.
    OMITTED_DEFAULTS: ClassVar[tuple[str, ...]] = ("products", "kv_heads", "form")

    def __post_init__(self):
        sizes = ("vocab_size", "max_length", "layers", "embed", "heads", "mlp", "part_step")
        for name in (*sizes, *(() if self.kv_heads is None else ("kv_heads",))):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.embed % self.heads:
            raise UserError(f"embed {self.embed} must be a multiple of heads {self.heads}")
        if self.heads % self.key_heads:
            raise UserError(f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")
        if self.position_init == "sinusoids" and self.embed % 2:
            raise UserError(f"embed is {self.embed}; it must be even for sinusoids")
        multiple = {"learned": 1, "rotary": 2, "rotary_2d": 4}[self.form.positions]
        if self.head_dim % multiple:
            raise UserError(
                f"embed / heads is {self.head_dim}; form.positions={self.form.positions} needs a "
                f"multiple of {multiple}"
            )
        first, stop = self.head_ids
        if not 0 <= first < stop <= self.vocab_size:
            raise UserError(
                f"form.head_ids is {self.head_ids}; it must be a range of the ids 0 to "
                f"{self.vocab_size - 1}"
            )

    @property
    def head_dim(self) -> int:
        return self.embed // self.heads

    @property
    def key_heads(self) -> int:
        """The number of heads of keys and values."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_ids(self) -> tuple[int, int]:
        """The first id that the output head has a row for, and one past the last such id."""
        return self.form.head_ids or (0, self.vocab_size)

    @property
    def head_rows(self) -> int:
        """The number of ids that the output head has a row for."""
        first, stop = self.head_ids
        return stop - first

    def parameter_count(self) -> int:
        """Returns the number of weights: blocks, tables, and the final norm."""
        block = sum(math.prod(weight.shape) for weight in layer_weights(self).values())
        rows = self.vocab_size + (0 if self.form.tied_head else self.head_rows)
        rows += self.max_length * (self.form.positions == "learned")
        rows += self.form.norm_scale + self.form.norm_bias
        return self.layers * block + rows * self.embed

    def product_weights(self) -> int:
        """Returns the number of weights of the products of all layers."""
        weights = layer_weights(self).values()
        return self.layers * sum(math.prod(each.shape) for each in weights if each.summed)

    def flops_per_token(self, length: int) -> int:
        """Returns the floating-point operations of a training step for each token.

        It counts the matmuls of the forward and backward pass (three times the forward pass), with
        the output head once and half of the attention square (causal). It does not count
        recomputation.

        Args:
          length: number of tokens of a row.
        """
        weights = self.product_weights() + self.head_rows * self.embed
        return 6 * weights + 6 * self.layers * length * self.embed


class Weight(NamedTuple):
    """A weight of a layer.

    Attributes:
      shape: its shape, without the axis of layers.
      axes: the logical name of each axis, see `leon_jax.sharding.RULES`.
      initial: truncated normals, zeros or ones.
      summed: number of its first axes that its product sums over. 0: it is added or multiplied.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    initial: Literal["normal", "zeros", "ones"]
    summed: int = 0


def layer_weights(config: DecoderConfig) -> dict[str, Weight]:
    """Returns the weights of a layer by name. The names of vectors end in `_scale` or `_bias`.

    At step 0 every layer is the identity. With norms before attention and MLP, the products at
    their end start as zeros. With norms behind them, the scales of these norms do.
    """
    form, embed, mlp = config.form, config.embed, config.mlp
    is_pre = form.norm_place == "pre"
    queries, keys = (config.heads, config.head_dim), (config.key_heads, config.head_dim)
    heads = ("heads", "head_dim")
    last: Literal["normal", "zeros"] = "zeros" if is_pre else "normal"
    weights = {
        "query": Weight((embed, *queries), ("weight_embed", *heads), "normal", 1),
        "key": Weight((embed, *keys), ("weight_embed", *heads), "normal", 1),
        "value": Weight((embed, *keys), ("weight_embed", *heads), "normal", 1),
        "out": Weight((*queries, embed), (*heads, "weight_embed"), last, 2),
        "fc1": Weight((embed, mlp), ("weight_embed", "mlp"), "normal", 1),
        "fc2": Weight((mlp, embed), ("mlp", "weight_embed"), last, 1),
    }
    if form.mlp == "swiglu":
        weights["gate"] = weights["fc1"]
    for name, shape in (("query", queries), ("key", keys), ("value", keys)):
        if form.qkv_bias:
            weights[f"{name}_bias"] = Weight(shape, heads, "zeros")
    # Without parameters by head, the axis of heads is missing.
    first = 0 if form.qk_norm_by_head else 1
    for name, shape in (("query", queries), ("key", keys)):
        if form.qk_norm != "none":
            weights[f"{name}_norm_scale"] = Weight(shape[first:], heads[first:], "ones")
        if form.qk_norm == "layer":
            weights[f"{name}_norm_bias"] = Weight(shape[first:], heads[first:], "zeros")
    if form.out_bias:
        weights["out_bias"] = Weight((embed,), ("embed",), "zeros")
    if form.mlp_bias:
        weights |= {
            f"{name}_bias": Weight((weights[name].shape[1],), (axis,), "zeros")
            for name, axis in (("fc1", "mlp"), ("fc2", "embed"), ("gate", "mlp"))
            if name in weights
        }
    for name in ("attention_norm", "mlp_norm"):
        if form.norm_scale:
            weights[f"{name}_scale"] = Weight((embed,), ("embed",), "ones" if is_pre else "zeros")
        if form.norm_bias:
            weights[f"{name}_bias"] = Weight((embed,), ("embed",), "zeros")
    return weights
