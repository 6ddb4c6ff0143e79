"""CLIP: an image encoder and a text encoder with a shared embedding space (arXiv 2103.00020).

It equals OpenAI's released ViT models, so that it can load their weights: bias-free patch
projection, a class token, pre-LN residual blocks with biases, a LayerNorm before and after the
vision tower, a causal text tower read at its end-of-text token, and bias-free projections. Layers
are stacked on a leading axis and scanned. The stem of small convolutions, an alternative to the
patch projection, is not in OpenAI's models. It learns several times faster from few images.

Einsum letters: b batch, t position, d width, c the three of q, k, v, h heads,
k size of a head, m hidden size of the MLP, e embedding, (y, x) grid of patches, (p, q)
inside a patch, r colour.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from leon_jax.ops.attention import attention
from leon_jax.ops.products import einsum
from leon_jax.sharding import spec

LAYER_NORM_EPSILON = 1e-5
# The largest scale of the cosines (not its logarithm).
MAX_SCALE = 100.0
# Mean and standard deviation of OpenAI's training images, for RGB in [0, 1].
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower; the defaults are ViT-B/32.

    Attributes:
      image_size: side of the square image, in pixels.
      patch_size: side of the patch of a token, in pixels.
      width: width of the transformer.
      layers: number of layers.
      heads: attention heads.
      stem: the layer from pixels to tokens. "patch" projects each patch separately, as in CLIP.
        "convolution" halves the image log2(patch_size) times with 3x3 convolutions ("Early
        convolutions help transformers see better", arXiv 2106.14881).
    """

    image_size: int = 224
    patch_size: int = 32
    width: int = 768
    layers: int = 12
    heads: int = 12
    stem: Literal["patch", "convolution"] = "patch"

    def __post_init__(self):
        if self.stem == "convolution" and self.patch_size & (self.patch_size - 1):
            raise ValueError(
                f"patch_size is {self.patch_size}; a stem of convolutions needs a power of two"
            )
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")

    @property
    def patches(self) -> int:
        """Number of patches of an image."""
        return (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The text tower; the defaults are those of ViT-B/32.

    `vocab_size` 0 leaves the size to the program that trains the encoder: it takes that of its text
    tokenizer. A model needs a size.

    The last id of the vocabulary is end-of-text. The tower's output at this token is the embedding.
    The id before it is start-of-text. Ids after the end are never read, so any id may be padding.
    """

    context_length: int = 77
    vocab_size: int = 0
    width: int = 512
    layers: int = 12
    heads: int = 8

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.context_length < 2 or (self.vocab_size != 0 and self.vocab_size < 3):
            raise ValueError("the text tower needs room for a start and an end token")

    @property
    def start(self) -> int:
        """Id of start-of-text."""
        return self.vocab_size - 2

    @property
    def end(self) -> int:
        """Id of end-of-text."""
        return self.vocab_size - 1


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Both towers and their joint embedding."""

    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    embed_dim: int = 512
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    logit_scale: float = math.log(1 / 0.07)  # initial value of the learned log-scale
    remat: bool = False  # recompute each layer in the backward pass

    FORMER_KEYS: ClassVar[Mapping[str, float]] = {"max_scale": MAX_SCALE}


def _parameter(
    rngs: nnx.Rngs, deviation: float, shape: tuple[int, ...], names: tuple[str | None, ...]
) -> nnx.Param:
    normal = nnx.initializers.normal(deviation)
    return nnx.Param(normal(rngs.params(), shape, jnp.float32, out_sharding=spec(*names)))


def _constant(value: float, shape: tuple[int, ...], names: tuple[str | None, ...]) -> nnx.Param:
    return nnx.Param(jnp.full(shape, value, jnp.float32, out_sharding=spec(*names)))


class LayerNorm(nnx.Module):
    """Normalises the last axis, then scales and shifts. `stack` adds a leading layers axis."""

    def __init__(self, width: int, stack: tuple[int, ...] = ()):
        names = ("layers",) * len(stack) + (None,)
        self.scale = _constant(1.0, (*stack, width), names)
        self.bias = _constant(0.0, (*stack, width), names)

    def __call__(self, x: Float[Array, "*any d"]) -> Float[Array, "*any d"]:
        mean = x.mean(-1, keepdims=True)
        variance = jnp.square(x - mean).mean(-1, keepdims=True)
        x = (x - mean) * jax.lax.rsqrt(variance + LAYER_NORM_EPSILON)
        return x * self.scale[...] + self.bias[...]


class Blocks(nnx.Module):
    """The stacked residual blocks of a tower: parameters have a leading axis of size `layers`.

    The initialisation is that of OpenAI's text tower: residual outputs are divided by
    sqrt(2 * layers).
    """

    def __init__(self, width: int, layers: int, heads: int, *, rngs: nnx.Rngs):
        head, mlp, stack = width // heads, 4 * width, (layers,)
        inner = width**-0.5
        outer = inner * (2 * layers) ** -0.5
        self.norm1, self.norm2 = LayerNorm(width, stack), LayerNorm(width, stack)
        qkv_names = ("layers", "weight_embed", None, "heads", "head_dim")
        self.qkv = _parameter(rngs, inner, (layers, width, 3, heads, head), qkv_names)
        self.qkv_bias = _constant(0.0, (layers, 3, heads, head), ("layers", *qkv_names[2:]))
        out_names = ("layers", "heads", "head_dim", "weight_embed")
        self.out = _parameter(rngs, outer, (layers, heads, head, width), out_names)
        self.out_bias = _constant(0.0, (layers, width), ("layers", None))
        fc1_names = ("layers", "weight_embed", "mlp")
        self.fc1 = _parameter(rngs, (2 * width) ** -0.5, (layers, width, mlp), fc1_names)
        self.fc1_bias = _constant(0.0, (layers, mlp), ("layers", "mlp"))
        self.fc2 = _parameter(rngs, outer, (layers, mlp, width), ("layers", "mlp", "weight_embed"))
        self.fc2_bias = _constant(0.0, (layers, width), ("layers", None))

    def apply(
        self,
        x: Float[Array, "b t d"],
        config: CLIPConfig,
        causal: bool,
        operands: DTypeLike | None = None,
    ) -> Float[Array, "b t d"]:
        """Runs all blocks in order.

        Args:
          x: the tokens.
          config: the model's configuration.
          causal: whether a position attends to no later positions.
          operands: dtype of the operands of the products with weights; None: that of x.
        """

        def layer(x, block):
            x = x + _attention(block, block.norm1(x), causal, operands)
            return x + _mlp(block, block.norm2(x), config.activation, operands), None

        return jax.lax.scan(jax.checkpoint(layer) if config.remat else layer, x, self)[0]


def _attention(
    block: Blocks, x: Float[Array, "b t d"], causal: bool, operands: DTypeLike | None
) -> Float[Array, "b t d"]:
    sharding = spec("batch", None, None, "heads", None)
    qkv = einsum("btd,dchk->btchk", x, block.qkv[...], operands, out_sharding=sharding)
    query, key, value = jnp.moveaxis(qkv + block.qkv_bias[...], 2, 0)
    # Rows are short, and the other implementations do not take their lengths.
    attended = attention(query, key, value, causal=causal, implementation="xla")
    sharding = spec("batch", None, None)
    out = einsum("bthk,hkd->btd", attended, block.out[...], operands, out_sharding=sharding)
    return out + block.out_bias[...]


def _mlp(
    block: Blocks, x: Float[Array, "b t d"], activation: str, operands: DTypeLike | None
) -> Float[Array, "b t d"]:
    sharding = spec("batch", None, "mlp")
    hidden = einsum("btd,dm->btm", x, block.fc1[...], operands, out_sharding=sharding)
    hidden = hidden + block.fc1_bias[...]
    if activation == "quick_gelu":
        hidden = hidden * jax.nn.sigmoid(1.702 * hidden)
    else:
        hidden = jax.nn.gelu(hidden, approximate=False)
    sharding = spec("batch", None, None)
    out = einsum("btm,md->btd", hidden, block.fc2[...], operands, out_sharding=sharding)
    return out + block.fc2_bias[...]


class PatchStem(nnx.Module):
    """Projects each patch separately, without bias: a convolution with stride = size."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        size = config.patch_size
        names = (None, None, None, "weight_embed")
        deviation = (3 * size * size) ** -0.5
        self.kernel = _parameter(rngs, deviation, (size, size, 3, config.width), names)

    def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b y x d"]:
        size = self.kernel.shape[0]
        shape = (x.shape[0], x.shape[1] // size, size, x.shape[2] // size, size, 3)
        x = x.reshape(shape, out_sharding=spec("batch", *(None,) * 5))
        out = spec("batch", None, None, None)
        return jnp.einsum("bypxqr,pqrd->byxd", x, self.kernel[...], out_sharding=out)


class ConvolutionStem(nnx.Module):
    """3x3 convolutions of stride 2, each followed by a LayerNorm over its channels and a ReLU.

    The last convolution has the width of the tower, each earlier one half the width of the next.
    """

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        depth = config.patch_size.bit_length() - 1
        widths = [3] + [config.width >> (depth - 1 - i) for i in range(depth)]
        self.kernels: nnx.List = nnx.List()
        self.norms: nnx.List = nnx.List()
        for inputs, outputs in itertools.pairwise(widths):
            deviation = (2 / (9 * inputs)) ** 0.5
            shape = (3, 3, inputs, outputs)
            self.kernels.append(_parameter(rngs, deviation, shape, (None,) * 4))
            self.norms.append(LayerNorm(outputs))

    def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b y x d"]:
        for kernel, norm in zip(self.kernels, self.norms, strict=True):
            x = jax.lax.conv_general_dilated(
                x, kernel[...], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jax.nn.relu(norm(x))
        return x


class CLIP(nnx.Module):
    """The image encoder and the text encoder. Create and call it under `jax.set_mesh`."""

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs):
        vision, text = config.vision, config.text
        self.config = config
        width = vision.width
        inner = width**-0.5
        rows, columns = (None, "weight_embed"), ("weight_embed", None)
        stem = PatchStem if vision.stem == "patch" else ConvolutionStem
        self.stem = stem(vision, rngs=rngs)
        self.class_token = _parameter(rngs, inner, (width,), (None,))
        self.patch_positions = _parameter(rngs, inner, (vision.patches + 1, width), (None, None))
        self.vision_before = LayerNorm(width)
        self.vision_blocks = Blocks(width, vision.layers, vision.heads, rngs=rngs)
        self.vision_after = LayerNorm(width)
        self.image_projection = _parameter(rngs, inner, (width, config.embed_dim), columns)

        self.tokens = _parameter(rngs, 0.02, (text.vocab_size, text.width), rows)
        shape = (text.context_length, text.width)
        self.token_positions = _parameter(rngs, 0.01, shape, (None, None))
        self.text_blocks = Blocks(text.width, text.layers, text.heads, rngs=rngs)
        self.text_after = LayerNorm(text.width)
        shape = (text.width, config.embed_dim)
        self.text_projection = _parameter(rngs, text.width**-0.5, shape, columns)
        self.logit_scale = _constant(config.logit_scale, (1,), (None,))

    def embed_image(
        self, images: Float[Array, "b h w 3"], operands: DTypeLike | None = None
    ) -> Float[Array, "b e"]:
        """Embeds images (RGB in [0, 1], `image_size` pixels a side) as unit vectors.

        `operands` is the dtype of the operands of the blocks' products; None is float32.
        """
        config = self.config.vision
        images = jax.reshard(images, spec("batch", None, None, None))
        x = self.stem((images - jnp.array(MEAN)) / jnp.array(DEVIATION))
        shape = (x.shape[0], config.patches, config.width)
        x = x.reshape(shape, out_sharding=spec("batch", None, None))
        # Position 0 is the class token; padding with zeros and adding it with its position keeps
        # the batch axis sharded without a broadcast copy.
        positions = self.patch_positions[...].at[0].add(self.class_token[...])
        x = jnp.pad(x, ((0, 0), (1, 0), (0, 0))) + positions
        x = self.vision_blocks.apply(self.vision_before(x), self.config, False, operands)
        return self._project(self.vision_after(x[:, 0]), self.image_projection)

    def embed_text(
        self, ids: Int[Array, "b t"], operands: DTypeLike | None = None
    ) -> Float[Array, "b e"]:
        """Embeds token ids (start, text, end, then any padding) as unit vectors.

        The embedding is the output at the first end token; without one, at the first token. t may
        be shorter than the context length. `operands` is that of `embed_image`.
        """
        out = spec("batch", None, None)
        table = jax.reshard(self.tokens[...], spec(None, None))
        x = table.at[ids].get(out_sharding=out) + self.token_positions[...][: ids.shape[1]]
        x = self.text_after(self.text_blocks.apply(x, self.config, True, operands))
        last = jnp.argmax(ids == self.config.text.end, axis=1)
        at_end = jax.nn.one_hot(last, ids.shape[1], dtype=x.dtype)
        pooled = jnp.einsum("bt,btd->bd", at_end, x, out_sharding=spec("batch", None))
        return self._project(pooled, self.text_projection)

    def scale(self) -> Float[Array, ""]:
        """Returns the scale of the cosines before the softmax: exp(logit_scale), clipped."""
        return jnp.minimum(jnp.exp(self.logit_scale[0]), MAX_SCALE)

    def _project(self, x: Float[Array, "b d"], projection: nnx.Param) -> Float[Array, "b e"]:
        out = spec("batch", None)
        x = jnp.einsum("bd,de->be", x, projection[...], out_sharding=out)
        return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)


def create(config: CLIPConfig, key: Array) -> CLIP:
    """Creates a CLIP with initial weights. Jit it to create large parameters in place."""
    return CLIP(config, rngs=nnx.Rngs(params=key))
