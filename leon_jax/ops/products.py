"""Products of two arrays with operands in another dtype, and sums in float32.

Some CPUs multiply bfloat16 numbers two to five times as fast as float32 numbers (AVX512-BF16, AMX),
but emulate all other bfloat16 operations. So on them only the operands of the large products should
be rounded to bfloat16, in the forward and in the backward pass. Everything else stays in float32.

XLA's CPU backend uses these instructions only if the first operand is summed over its last axes and
the second over its first or last, after common axes. Otherwise it converts the operands back to
float32, or fails. `sum_in_float32` therefore transposes the operands. JAX's setting
`precision="BF16_BF16_F32"` does not help: XLA ignores it on CPUs.
"""

import functools
import string
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

# "dtype": operands have the compute dtype.
Products = Literal["dtype", "bfloat16", "auto"]


def operand_dtype(products: Products, dtype: DTypeLike) -> jnp.dtype:
    """Returns the dtype of the operands of large products.

    Args:
      products: "dtype", "bfloat16", or "auto": bfloat16 on CPUs with instructions for it, elsewhere
        `dtype`.
      dtype: the compute dtype.
    """
    if products == "bfloat16" or (products == "auto" and _is_fast_cpu()):
        return jnp.dtype(jnp.bfloat16)
    return jnp.dtype(dtype)


def einsum(
    subscripts: str,
    x: Float[Array, "..."],
    y: Float[Array, "..."],
    operands: DTypeLike | None = None,
    *,
    out_dtype: DTypeLike | None = None,
    out_sharding: jax.P | None = None,
) -> Float[Array, "..."]:
    """Computes `jnp.einsum(subscripts, x, y)` with operands of a given dtype.

    The gradients of x and y are such products too: the incoming gradient is rounded to `operands`.

    Args:
      subscripts: two operands and a result; only x and the result may begin with `...`. An axis of
        one operand is in the other operand or in the result.
      x, y: the operands. Only x decides the dtype of the result.
      operands: dtype of the operands; None: that of x. If it is not that of x, sums are in float32.
      out_dtype: dtype of the result; None: that of x.
      out_sharding: sharding of the result; None inside `jax.shard_map`.
    """
    if operands is None or jnp.dtype(operands) == x.dtype:
        return jnp.einsum(
            subscripts,
            x,
            y.astype(x.dtype),
            preferred_element_type=out_dtype,
            out_sharding=out_sharding,
        )
    subscripts = _without_ellipsis(subscripts, x.ndim)
    result = _rounded(subscripts, jnp.dtype(operands), out_sharding, x, y)
    return result.astype(x.dtype if out_dtype is None else out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _rounded(subscripts, operands, out_sharding, x, y):
    return sum_in_float32(subscripts, x.astype(operands), y.astype(operands), out_sharding)


def _rounded_forward(subscripts, operands, out_sharding, x, y):
    # x is saved as it is, because several products of a layer share it, and save it once.
    return _rounded(subscripts, operands, out_sharding, x, y), (x, y)


def _rounded_backward(subscripts, operands, out_sharding, saved, gradient):
    x, y = saved
    of_x, of_y, of_result = subscripts.replace("->", ",").split(",")

    def layout(array):
        return None if out_sharding is None else jax.typeof(array).sharding.spec

    rounded = gradient.astype(operands)
    x_gradient = sum_in_float32(
        f"{of_result},{of_y}->{of_x}", rounded, y.astype(operands), layout(x)
    )
    y_gradient = sum_in_float32(
        f"{of_x},{of_result}->{of_y}", x.astype(operands), rounded, layout(y)
    )
    return x_gradient.astype(x.dtype), y_gradient.astype(y.dtype)


_rounded.defvjp(_rounded_forward, _rounded_backward)


def sum_in_float32(
    subscripts: str,
    x: Float[Array, "..."],
    y: Float[Array, "..."],
    out_sharding: jax.P | None = None,
) -> Float[Array, "..."]:
    """Computes `jnp.einsum` with float32 sums, in the form that XLA's CPU backend computes fast.

    Args:
      subscripts: two operands without `...`, and a result. An axis of one operand is in the other
        operand or in the result.
      x, y: the operands, of one dtype.
      out_sharding: sharding of the result; None inside `jax.shard_map`.
    """
    operands, of_result = subscripts.split("->")
    of_x, of_y = operands.split(",")
    batch = "".join(axis for axis in of_result if axis in of_x and axis in of_y)
    summed = "".join(axis for axis in of_x if axis in of_y and axis not in batch)
    rows = "".join(axis for axis in of_result if axis not in of_y)
    columns = "".join(axis for axis in of_result if axis not in of_x)
    fast_x, fast_y, fast_result = (
        batch + rows + summed,
        batch + summed + columns,
        batch + rows + columns,
    )
    if of_y == batch + columns + summed:
        fast_y = of_y  # as fast
    x, y = _transpose(x, of_x, fast_x), _transpose(y, of_y, fast_y)
    if out_sharding is not None:
        names = dict(zip(of_result, out_sharding, strict=True))
        out_sharding = jax.P(*(names[axis] for axis in fast_result))
    # Without the barriers, XLA moves transpositions into the product, and the form is lost.
    x, y = jax.lax.optimization_barrier((x, y))
    result = jnp.einsum(
        f"{fast_x},{fast_y}->{fast_result}",
        x,
        y,
        preferred_element_type=jnp.float32,
        out_sharding=out_sharding,
    )
    if fast_result == of_result:
        return result
    return _transpose(jax.lax.optimization_barrier(result), fast_result, of_result)


def _transpose(array: Array, before: str, after: str) -> Array:
    """Transposes an array with axes `before` to axes `after`."""
    return array if before == after else jnp.transpose(array, [before.index(x) for x in after])


def _without_ellipsis(subscripts: str, ndim: int) -> str:
    """Replaces the `...` of the first operand, which has `ndim` axes, by letters."""
    if "..." not in subscripts:
        return subscripts
    named = len(subscripts.split(",")[0]) - len("...")
    free = [letter for letter in string.ascii_uppercase if letter not in subscripts]
    return subscripts.replace("...", "".join(free[: ndim - named]))


def _is_fast_cpu() -> bool:
    """Returns whether the devices of the current mesh are CPUs with bfloat16 instructions."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = jax.devices()[0].device_kind if device is None else device.device_kind
    return kind.lower() == "cpu" and _has_bfloat16_instructions()


@functools.cache
def _has_bfloat16_instructions(path: str = "/proc/cpuinfo") -> bool:
    """Returns whether Linux lists AMX or AVX512 instructions for bfloat16; elsewhere False."""
    try:
        words = Path(path).read_text().split()
    except OSError:
        return False
    return "amx_bf16" in words or "avx512_bf16" in words
