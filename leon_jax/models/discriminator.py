"""The PatchGAN discriminator of VQ-GAN training (Isola et al. 2017, arXiv 1611.07004)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from leon_jax.models.vqgan import Conv


class BatchNorm(nnx.Module):
    """Normalisation with the statistics of the batch (eps 1e-5).

    A discriminator runs only in training, so it needs no running averages.
    """

    def __init__(self, channels: int) -> None:
        self.scale = nnx.Param(jnp.ones((channels,), jnp.float32))
        self.shift = nnx.Param(jnp.zeros((channels,), jnp.float32))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        mean = x.mean((0, 1, 2))
        variance = jnp.square(x - mean).mean((0, 1, 2))
        return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * self.scale[...] + self.shift[...]


class PatchDiscriminator(nnx.Module):
    """Scores overlapping patches: float32[b, h, w, 3] -> float32[b, h', w'], higher is more real.

    It has 4x4 convolutions, `layers` of them with stride 2. The width doubles up to 8 x `channels`.
    """

    def __init__(self, channels: int = 64, layers: int = 3, *, rngs: nnx.Rngs) -> None:
        pad = ((1, 1), (1, 1))
        self.first = Conv(3, channels, 4, stride=2, pad=pad, rngs=rngs)
        convs, norms, width = [], [], channels
        for layer in range(1, layers + 1):
            wider = channels * min(2**layer, 8)
            stride = 2 if layer < layers else 1
            convs.append(Conv(width, wider, 4, stride=stride, pad=pad, rngs=rngs))
            norms.append(BatchNorm(wider))
            width = wider
        self.convs, self.norms = nnx.List(convs), nnx.List(norms)
        self.last = Conv(width, 1, 4, pad=pad, rngs=rngs)

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b i j"]:
        x = jax.nn.leaky_relu(self.first(images), 0.2)
        for layer, norm in zip(self.convs, self.norms, strict=True):
            x = jax.nn.leaky_relu(norm(layer(x)), 0.2)
        return self.last(x)[..., 0]


def hinge_loss(real: Float[Array, "..."], fake: Float[Array, "..."]) -> Float[Array, ""]:
    """Returns the discriminator's hinge loss: the mean of both terms, as in taming."""
    return 0.5 * (jax.nn.relu(1.0 - real).mean() + jax.nn.relu(1.0 + fake).mean())
