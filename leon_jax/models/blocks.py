"""The layers of the decoder, with stacked weights; `leon_jax.models.decoder` scans over them."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from leon_jax.models.decoder_config import DecoderConfig, layer_weights
from leon_jax.models.int8_weight import Int8Weight, product
from leon_jax.ops.norm import normalize
from leon_jax.ops.rotary import Rotation, rotate
from leon_jax.sharding import spec

# A layer's attention, from (query, key, value) to the attended values. It is the only difference
# between training, prefill and a decode step.
Attend = Callable[[Array, Array, Array], Array]


class Blocks(nnx.Module):
    """The stacked weights of all layers. Inside the scan, an instance holds one layer.

    Which weights there are depends on the form; see `layer_weights`.
    """

    query: nnx.Param | Int8Weight
    key: nnx.Param | Int8Weight
    value: nnx.Param | Int8Weight
    out: nnx.Param | Int8Weight
    fc1: nnx.Param | Int8Weight
    fc2: nnx.Param | Int8Weight
    gate: nnx.Param | Int8Weight

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.form = config.form
        initializers = {
            "normal": truncated_normal(config.init_std),
            "zeros": nnx.initializers.zeros_init(),
            "ones": nnx.initializers.ones_init(),
        }
        for name, weight in layer_weights(config).items():
            shape, layout = (config.layers, *weight.shape), spec("layers", *weight.axes)
            init = initializers[weight.initial]
            setattr(self, name, nnx.Param(init(rngs.params(), shape, jnp.float32, layout)))

    def __call__(
        self,
        x: Float[Array, "*lead embed"],
        attend: Attend,
        rotation: Rotation | None = None,
        operands: DTypeLike | None = None,
    ) -> tuple[Float[Array, "*lead embed"], tuple[Array, Array]]:
        """Runs one layer: x + attention(norm(x)), then x + mlp(norm(x)).

        With `Form.norm_place` "post": x + norm(attention(x)), then x + norm(mlp(x)).

        Args:
          x: the residual stream.
          attend: maps query [*lead, heads, head_dim], key and value [*lead, kv_heads, head_dim] to
            the attended values, [*lead, heads, head_dim].
          rotation: rotates queries and keys; None: positions are not rotary.
          operands: dtype of the operands of the products with weights; None: that of x.

        Returns:
          The new residual stream, and (key, value).
        """
        q, k, v = self.qkv(self._norm_if("pre", "attention_norm", x), rotation, operands)
        attended = self.output(attend(q, k, v), operands)
        x = x + self._norm_if("post", "attention_norm", attended)
        hidden = self.mlp(self._norm_if("pre", "mlp_norm", x), operands)
        x = x + self._norm_if("post", "mlp_norm", hidden)
        return x, (k, v)

    def qkv(
        self,
        x: Float[Array, "*lead embed"],
        rotation: Rotation | None = None,
        operands: DTypeLike | None = None,
    ) -> tuple[Array, Array, Array]:
        """Returns query [*lead, heads, head_dim], key and value [*lead, kv_heads, head_dim]."""
        sharding = jax.P(*lead_spec(x), *spec("heads", "head_dim"))
        q, k, v = (
            self._biased(
                name, product("...d,dhk->...hk", x, getattr(self, name), sharding, operands)
            )
            for name in ("query", "key", "value")
        )
        if self.form.qk_norm != "none":
            q = self._norm("query_norm", self.form.qk_norm, q)
            k = self._norm("key_norm", self.form.qk_norm, k)
        if rotation is not None:
            q, k = (rotate(each, rotation, self.form.rotary_pairs) for each in (q, k))
        return q, k, v

    def output(
        self, attended: Float[Array, "*lead heads head_dim"], operands: DTypeLike | None = None
    ) -> Float[Array, "*lead embed"]:
        """Projects the attended values of all heads to the width of the model."""
        sharding = jax.P(*lead_spec(attended, 2), None)
        result = product("...hk,hkd->...d", attended, self.out, sharding, operands)
        return self._biased("out", result)

    def mlp(
        self, x: Float[Array, "*lead embed"], operands: DTypeLike | None = None
    ) -> Float[Array, "*lead embed"]:
        """Runs the MLP."""

        def project(name: str) -> Array:
            sharding = jax.P(*lead_spec(x), *spec("mlp"))
            weight = getattr(self, name)
            return self._biased(name, product("...d,df->...f", x, weight, sharding, operands))

        hidden = project("fc1")
        match self.form.mlp:
            case "relu":
                hidden = jax.nn.relu(hidden)
            case "gelu":
                hidden = jax.nn.gelu(hidden, approximate=False)
            case "swiglu":
                hidden = jax.nn.silu(project("gate")) * hidden
        sharding = jax.P(*lead_spec(x), None)
        return self._biased("fc2", product("...f,fd->...d", hidden, self.fc2, sharding, operands))

    def _vector(self, name: str) -> Array | None:
        """Returns a scale or a bias; None: the form has none."""
        weight = getattr(self, name, None)
        return None if weight is None else weight[...]

    def _biased(self, name: str, x: Array) -> Array:
        bias = self._vector(f"{name}_bias")
        return x if bias is None else x + bias.astype(x.dtype)

    def _norm(self, name: str, kind: Literal["layer", "rms"], x: Array) -> Array:
        scale, bias = self._vector(f"{name}_scale"), self._vector(f"{name}_bias")
        return normalize(x, kind, scale, bias, self.form.norm_epsilon)

    def _norm_if(self, place: Literal["pre", "post"], name: str, x: Array) -> Array:
        """Returns the norm of x if the norms of the form stand at this place, else x."""
        return self._norm(name, self.form.norm, x) if self.form.norm_place == place else x


def lead_spec(x: Array, last: int = 1) -> tuple:
    """Returns the sharding of all axes of `x` except the `last` ones."""
    return tuple(jax.typeof(x).sharding.spec)[: x.ndim - last]


def truncated_normal(std: float) -> nnx.Initializer:
    """Returns an initializer of normals with this sd, cut at 3 sd.

    `std` is the sd before the cut, as in torch's `trunc_normal_`, which the original uses. The cut
    changes the sd by 1.3 %.
    """
    return nnx.initializers.truncated_normal(std, lower=-3.0, upper=3.0)
