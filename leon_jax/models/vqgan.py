"""The VQ-GAN image tokenizer: converts pixels to a grid of discrete codes and back.

The network is that of taming-transformers (Esser et al. 2021, arXiv 2012.09841), which
Make-A-Scene (Gafni et al. 2022) and CM3Leon use: residual blocks with group normalisation and
swish, strided-convolution downsampling, self-attention at the coarsest levels. All images are
NHWC, float32, in [-1, 1].
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class VQGANConfig:
    """Sizes of the tokenizer.

    Attributes:
      resolution: height and width of an image, in pixels.
      channels: width of the first level.
      multipliers: width of each level divided by `channels`. Each level after the first halves the
        image, so the downsampling factor is 2 ** (len(multipliers) - 1).
      blocks: residual blocks of each level of the encoder. The decoder has one more.
      attention_sizes: sides of the feature map at which attention follows a residual block.
      groups: groups of the group normalisation.
      latent: channels of the encoder's output.
      code_dim: size of a codebook vector.
      codes: entries of the codebook.
      unit_codes: whether latents and codebook vectors have length 1, so that the nearest code is
        the one with the most similar direction (ViT-VQGAN, Yu et al. 2022, arXiv 2110.04627;
        LlamaGen). It suits a small `code_dim`, for example 8.
      code_logits: whether a linear layer gives the logits of the codes, and the code is the largest
        one, instead of the nearest codebook vector. Models that were trained with the Gumbel
        softmax need it (the tokenizer of DALL-E, arXiv 2102.12092; taming's GumbelVQ). Such models
        can be used but not trained here.
      pixel_patch: the decoder's last layer makes squares of this side at once (sub-pixel
        convolution, Shi et al. 2016, arXiv 1609.05158), so the decoder leaves out its finest
        levels. A power of 2, below the downsampling factor. 1, as in taming: single pixels.
      halo: pixels around its patch that a code may depend on; None, as in taming: the whole image.
        Without a limit, a code depends on everything around it, so that even a white area has
        hundreds of codes. This improves the fidelity of images, but a small decoder must learn all
        of these codes. With a halo, the encoder is one convolution over patches, and residual
        layers on each position; `blocks` and `attention_sizes` then apply only to the decoder.
      remat: recompute each layer in the backward pass, to save memory; with a halo, only the
        decoder's layers.
    """

    resolution: int = 256
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 4)
    blocks: int = 2
    attention_sizes: tuple[int, ...] = (32,)
    groups: int = 32
    latent: int = 256
    code_dim: int = 256
    codes: int = 8192
    unit_codes: bool = False
    code_logits: bool = False
    pixel_patch: int = 1
    halo: int | None = None
    remat: bool = False

    OMITTED_DEFAULTS: ClassVar[tuple[str, ...]] = (
        "unit_codes", "code_logits", "pixel_patch", "remat",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.resolution % self.factor:
            raise ValueError(f"resolution {self.resolution} is not a multiple of {self.factor}")
        widths = {self.channels * multiplier for multiplier in self.multipliers}
        if any(width % self.groups for width in widths):
            raise ValueError(f"groups ({self.groups}) must divide every level's width {widths}")
        patches = [2**level for level in range(max(1, len(self.multipliers) - 1))]
        if self.pixel_patch not in patches:
            choices = ", ".join(map(str, patches))
            raise ValueError(f"pixel_patch is {self.pixel_patch}; it must be one of {choices}")
        if self.halo is not None and self.halo < 0:
            raise ValueError(f"halo is {self.halo}; it must not be negative")

    @property
    def factor(self) -> int:
        """Side of the patch of a code, in pixels."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def grid(self) -> int:
        """Side of the grid of codes of an image."""
        return self.resolution // self.factor


class Conv(nnx.Module):
    """A convolution on NHWC with a bias. The weights are replicated on every device."""

    def __init__(
        self, inputs: int, outputs: int, size: int, *, stride: int = 1, pad=None, rngs: nnx.Rngs
    ) -> None:
        self.stride = stride
        self.pad = ((size // 2, size // 2),) * 2 if pad is None else pad
        bound = 1 / math.sqrt(inputs * size * size)
        shape = (size, size, inputs, outputs)
        self.kernel = nnx.Param(
            jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)
        )
        self.bias = nnx.Param(jnp.zeros((outputs,), jnp.float32))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        return conv(x, self.kernel[...], self.bias[...], self.stride, self.pad)


def conv(x, kernel, bias, stride=1, pad=((1, 1), (1, 1))):
    """Computes a two-dimensional convolution, NHWC by HWIO, plus a bias."""
    y = jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), pad, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y + bias


class GroupNorm(nnx.Module):
    """Group normalisation (eps 1e-6, as taming) with a learned scale and shift."""

    def __init__(self, channels: int, groups: int) -> None:
        self.groups = groups
        self.scale = nnx.Param(jnp.ones((channels,), jnp.float32))
        self.shift = nnx.Param(jnp.zeros((channels,), jnp.float32))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        # First the moments of each channel, then of each group, so the large array has no reshape.
        mean = self._by_group(x.mean((1, 2)))
        centred = x - mean[:, None, None]
        variance = self._by_group(jnp.square(centred).mean((1, 2)))
        factor = jax.lax.rsqrt(variance + 1e-6) * self.scale[...]
        return centred * factor[:, None, None] + self.shift[...]

    def _by_group(self, x: Float[Array, "b c"]) -> Float[Array, "b c"]:
        means = x.reshape(x.shape[0], self.groups, -1).mean(-1)
        return jnp.repeat(means, x.shape[1] // self.groups, axis=1)


class ResidualBlock(nnx.Module):
    """Adds to the input the result of twice norm, swish and 3x3 convolution."""

    def __init__(self, inputs: int, outputs: int, groups: int, *, rngs: nnx.Rngs) -> None:
        self.norm1 = GroupNorm(inputs, groups)
        self.conv1 = Conv(inputs, outputs, 3, rngs=rngs)
        self.norm2 = GroupNorm(outputs, groups)
        self.conv2 = Conv(outputs, outputs, 3, rngs=rngs)
        self.skip = Conv(inputs, outputs, 1, rngs=rngs) if inputs != outputs else None

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        hidden = self.conv1(jax.nn.silu(self.norm1(x)))
        hidden = self.conv2(jax.nn.silu(self.norm2(hidden)))
        return hidden + (x if self.skip is None else self.skip(x))


class Attention(nnx.Module):
    """Adds to the input its single-head self-attention over all positions."""

    def __init__(self, channels: int, groups: int, *, rngs: nnx.Rngs) -> None:
        self.norm = GroupNorm(channels, groups)
        self.qkv = Conv(channels, 3 * channels, 1, rngs=rngs)
        self.out = Conv(channels, channels, 1, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        q, k, v = jnp.split(self.qkv(self.norm(x)), 3, axis=-1)
        scores = jnp.einsum("bhwc,bijc->bhwij", q, k) / math.sqrt(x.shape[-1])
        # A softmax over both position axes, without a reshape.
        scores = scores - jax.lax.stop_gradient(scores.max((3, 4), keepdims=True))
        weights = jnp.exp(scores)
        weights = weights / weights.sum((3, 4), keepdims=True)
        return x + self.out(jnp.einsum("bhwij,bijc->bhwc", weights, v))


class Encoder(nnx.Module):
    """Encodes pixels to latents: float32[b, R, R, 3] -> float32[b, R/f, R/f, latent]."""

    def __init__(self, config: VQGANConfig, *, rngs: nnx.Rngs) -> None:
        groups = config.groups
        width = config.channels
        layers: list[nnx.Module] = [Conv(3, width, 3, rngs=rngs)]
        size = config.resolution
        for level, multiplier in enumerate(config.multipliers):
            if level:
                # Padding of one row and column at the end only, as in taming.
                layers.append(Conv(width, width, 3, stride=2, pad=((0, 1), (0, 1)), rngs=rngs))
                size //= 2
            for _ in range(config.blocks):
                layers.append(ResidualBlock(width, config.channels * multiplier, groups, rngs=rngs))
                width = config.channels * multiplier
                if size in config.attention_sizes:
                    layers.append(Attention(width, groups, rngs=rngs))
        layers += [
            ResidualBlock(width, width, groups, rngs=rngs),
            Attention(width, groups, rngs=rngs),
            ResidualBlock(width, width, groups, rngs=rngs),
        ]
        self.layers, self.remat = nnx.List(layers), config.remat
        self.norm = GroupNorm(width, groups)
        self.out = Conv(width, config.latent, 3, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b i j c"]:
        x = _run(self.layers, x, self.remat)
        return self.out(jax.nn.silu(self.norm(x)))


class PatchEncoder(nnx.Module):
    """An encoder whose latents depend only on their patch and its halo."""

    def __init__(self, config: VQGANConfig, halo: int, *, rngs: nnx.Rngs) -> None:
        width, factor = config.channels * config.multipliers[-1], config.factor
        pad = ((halo, halo), (halo, halo))
        self.patches = Conv(3, width, factor + 2 * halo, stride=factor, pad=pad, rngs=rngs)
        self.wide = nnx.List([Conv(width, 2 * width, 1, rngs=rngs) for _ in range(2)])
        self.narrow = nnx.List([Conv(2 * width, width, 1, rngs=rngs) for _ in range(2)])
        self.out = Conv(width, config.latent, 1, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b i j c"]:
        # Makes the zero padding white, like the background of drawings. In x, 0 is grey.
        x = self.patches(x - 1)
        for wide, narrow in zip(self.wide, self.narrow, strict=True):
            x = x + narrow(jax.nn.silu(wide(x)))
        return self.out(jax.nn.silu(x))


class Decoder(nnx.Module):
    """Decodes latents to pixels: float32[b, R/f, R/f, latent] -> float32[b, R, R, 3]."""

    def __init__(self, config: VQGANConfig, *, rngs: nnx.Rngs) -> None:
        groups = config.groups
        width = config.channels * config.multipliers[-1]
        layers: list[nnx.Module] = [
            Conv(config.latent, width, 3, rngs=rngs),
            ResidualBlock(width, width, groups, rngs=rngs),
            Attention(width, groups, rngs=rngs),
            ResidualBlock(width, width, groups, rngs=rngs),
        ]
        size = config.grid
        # Each doubling of `pixel_patch` leaves out a level.
        finest = config.pixel_patch.bit_length() - 1
        for level, multiplier in enumerate(reversed(config.multipliers[finest:])):
            if level:
                layers.append(Upsample(width, rngs=rngs))
                size *= 2
            for _ in range(config.blocks + 1):
                layers.append(ResidualBlock(width, config.channels * multiplier, groups, rngs=rngs))
                width = config.channels * multiplier
                if size in config.attention_sizes:
                    layers.append(Attention(width, groups, rngs=rngs))
        self.layers, self.remat = nnx.List(layers), config.remat
        self.norm = GroupNorm(width, groups)
        self.patch = config.pixel_patch
        self.out = Conv(width, 3 * self.patch**2, 3, rngs=rngs)

    def features(self, latents: Float[Array, "b i j c"]) -> Float[Array, "b h w c"]:
        """Returns the input of the last convolution, where the adaptive GAN weight is measured."""
        x = _run(self.layers, latents, self.remat)
        return jax.nn.silu(self.norm(x))

    def pixels(
        self, features: Float[Array, "b i j c"], kernel: Float[Array, "3 3 c d"] | None = None
    ) -> Float[Array, "b h w 3"]:
        """Applies the last convolution, with its own kernel or another one."""
        kernel = self.out.kernel[...] if kernel is None else kernel
        x = conv(features, kernel, self.out.bias[...])
        return x if self.patch == 1 else _squares(x, self.patch)

    def __call__(self, latents: Float[Array, "b i j c"]) -> Float[Array, "b h w 3"]:
        return self.pixels(self.features(latents))


def _squares(x: Float[Array, "b i j c"], side: int) -> Float[Array, "b h w 3"]:
    """Makes a square of pixels of the channels of each position, row by row."""
    batch, height, width, _ = x.shape
    by_image = jax.typeof(x).sharding.spec[:1]
    rows = x.reshape(
        (batch, height, width, side, side, 3), out_sharding=jax.P(*by_image, *[None] * 5)
    ).swapaxes(2, 3)
    return rows.reshape(
        (batch, height * side, width * side, 3), out_sharding=jax.P(*by_image, *[None] * 3)
    )


def _run(layers: Iterable[nnx.Module], x: Array, remat: bool) -> Array:
    """Runs layers in order; with `remat`, the backward pass recomputes each of them."""

    def run(layer, x):
        return layer(x)

    for layer in layers:
        x = jax.checkpoint(run)(layer, x) if remat else run(layer, x)
    return x


class Upsample(nnx.Module):
    """Doubles the size by nearest neighbours, then applies a 3x3 convolution."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs) -> None:
        self.conv = Conv(channels, channels, 3, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b 2h 2w c"]:
        return self.conv(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))


class VQGAN(nnx.Module):
    """Encoder, codebook and decoder."""

    def __init__(self, config: VQGANConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        if config.halo is None:
            self.encoder: nnx.Module = Encoder(config, rngs=rngs)
        else:
            self.encoder = PatchEncoder(config, config.halo, rngs=rngs)
        self.to_code = Conv(config.latent, config.code_dim, 1, rngs=rngs)
        self.logits = (
            Conv(config.code_dim, config.codes, 1, rngs=rngs) if config.code_logits else None
        )
        self.codebook = nnx.Param(
            jax.random.uniform(
                rngs.params(),
                (config.codes, config.code_dim),
                jnp.float32,
                -1 / config.codes,
                1 / config.codes,
            )
        )
        self.from_code = Conv(config.code_dim, config.latent, 1, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)

    def latents(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b i j d"]:
        """Returns the continuous latents, before quantisation."""
        latents = self.to_code(self.encoder(images))
        return _unit(latents) if self.config.unit_codes else latents

    def vectors(self) -> Float[Array, "k d"]:
        """Returns the codebook, with vectors of length 1 if `unit_codes` is set."""
        codebook = self.codebook[...]
        return _unit(codebook) if self.config.unit_codes else codebook

    def encode(self, images: Float[Array, "b h w 3"]) -> Int[Array, "b i j"]:
        """Encodes images in [-1, 1] to codes."""
        latents = self.latents(images)
        if self.logits is not None:
            return jnp.argmax(self.logits(latents), axis=-1).astype(jnp.int32)
        return nearest_code(latents, self.vectors())

    def decode(self, codes: Int[Array, "b i j"]) -> Float[Array, "b h w 3"]:
        """Decodes codes to images. Values may be slightly outside [-1, 1]."""
        return self.decoder(self.from_code(self.vectors().at[codes].get(out_sharding=_like(codes))))


def nearest_code(
    latents: Float[Array, "b i j d"], codebook: Float[Array, "k d"]
) -> Int[Array, "b i j"]:
    """Returns the index of the nearest codebook row (Euclidean distance) of each latent."""
    # |z - e|^2 = |z|^2 - 2 z.e + |e|^2, and |z|^2 does not change which e is nearest.
    scores = 2 * jnp.einsum("bijd,kd->bijk", latents, codebook) - jnp.square(codebook).sum(-1)
    return jnp.argmax(scores, axis=-1).astype(jnp.int32)


def quantize(
    latents: Float[Array, "b i j d"], codebook: Float[Array, "k d"], commitment: float
) -> tuple[Float[Array, "b i j d"], Float[Array, ""], Int[Array, "b i j"]]:
    """Quantizes latents with a straight-through gradient (van den Oord et al. 2017, eq. 3).

    Returns:
      The codebook vectors, whose gradient goes to `latents` unchanged.
      The loss `|sg(z) - e|^2 + commitment * |z - sg(e)|^2`, mean over elements, as in the paper
      (arXiv 1711.00937). By mistake, taming by default multiplies the other term.
      The codes.
    """
    stop = jax.lax.stop_gradient
    codes = nearest_code(stop(latents), stop(codebook))
    vectors = codebook.at[codes].get(out_sharding=_like(codes))
    loss = jnp.square(stop(latents) - vectors).mean()
    loss += commitment * jnp.square(latents - stop(vectors)).mean()
    return latents + stop(vectors - latents), loss, codes


def _unit(vectors: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """Returns vectors of length 1 in the same directions."""
    lengths = jnp.sqrt(jnp.square(vectors).sum(-1, keepdims=True))
    return vectors / jnp.maximum(lengths, 1e-12)


def _like(codes: Int[Array, "b i j"]) -> jax.P:
    """Returns the sharding of `[b, i, j, d]` arrays for these codes."""
    return jax.P(*jax.typeof(codes).sharding.spec, None)
