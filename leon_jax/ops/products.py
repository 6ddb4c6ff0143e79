"""Products of two arrays with operands in another dtype, and sums in float32.

Some CPUs multiply bfloat16 numbers two to five times as fast as float32 numbers (AVX512-BF16, AMX),
but emulate all other bfloat16 operations. So on them only the operands of the large products should
be rounded to bfloat16, in the forward and in the backward pass. Everything else stays in float32.

XLA's CPU backend uses these instructions only if, after common axes, the first operand is summed
over its last axes, and the second over its first or last. Otherwise it converts the operands back
to float32, or even fails, except that it transposes operands that are summed over several axes. So
`sum_in_float32` transposes them. JAX's setting `precision="BF16_BF16_F32"` does not help: XLA
ignores it on CPUs.
"""

import functools
import math
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
    is_fast = on_cpu() and _has_bfloat16_instructions()
    if products == "bfloat16" or (products == "auto" and is_fast):
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
        one operand is in the other operand or in the result. If axes of x, y or the result are
        exchanged before or after, this must be done by `transpose`.
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
    dtypes = x.dtype, y.dtype
    result = _rounded(subscripts, jnp.dtype(operands), dtypes, out_sharding, x, y)
    return result.astype(x.dtype if out_dtype is None else out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _rounded(subscripts, operands, dtypes, out_sharding, x, y):
    return sum_in_float32(subscripts, x.astype(operands), y.astype(operands), out_sharding)


def _rounded_forward(subscripts, operands, dtypes, out_sharding, x, y):
    # x is an activation and saved in fewer bits. y may be a weight, which is in memory anyway.
    x = x.astype(operands)
    return sum_in_float32(subscripts, x, y.astype(operands), out_sharding), (x, y)


def _rounded_backward(subscripts, operands, dtypes, out_sharding, saved, gradient):
    x, y = saved
    of_x, of_y, of_result = subscripts.replace("->", ",").split(",")

    def layout(array):
        return None if out_sharding is None else jax.typeof(array).sharding.spec

    rounded = gradient.astype(operands)
    x_gradient = sum_in_float32(
        f"{of_result},{of_y}->{of_x}", rounded, y.astype(operands), layout(x)
    )
    y_gradient = sum_in_float32(f"{of_x},{of_result}->{of_y}", x, rounded, layout(y))
    return x_gradient.astype(dtypes[0]), y_gradient.astype(dtypes[1])


_rounded.defvjp(_rounded_forward, _rounded_backward)


def sum_in_float32(
    subscripts: str,
    x: Float[Array, "..."],
    y: Float[Array, "..."],
    out_sharding: jax.P | None = None,
) -> Float[Array, "..."]:
    """Computes `jnp.einsum` with float32 sums, on one device in the fastest form for CPUs.

    Args:
      subscripts: two operands without `...`, and a result. An axis of one operand is in the other
        operand or in the result.
      x, y: the operands, of one dtype.
      out_sharding: sharding of the result; None inside `jax.shard_map`.
    """
    if out_sharding is None:
        return _fastest(subscripts, x, y)
    if jax.sharding.get_abstract_mesh().size > 1:
        return jnp.einsum(
            subscripts, x, y, preferred_element_type=jnp.float32, out_sharding=out_sharding
        )
    x, y = (jax.reshard(array, jax.P(*[None] * array.ndim)) for array in (x, y))
    return jax.reshard(_fastest(subscripts, x, y), out_sharding)


def _fastest(subscripts: str, x: Array, y: Array) -> Array:
    """Computes a product in the fast form that transposes the fewest numbers."""
    operands, of_result = subscripts.split("->")
    of_x, of_y = operands.split(",")
    sizes = dict(zip(of_x + of_y, x.shape + y.shape, strict=True))
    common = "".join(axis for axis in of_result if axis in of_x and axis in of_y)

    def form(of_x, of_y):
        rows = "".join(axis for axis in of_result if axis not in of_y)
        columns = "".join(axis for axis in of_result if axis not in of_x)
        summed = "".join(axis for axis in of_x if axis in of_y and axis not in common)
        # Both forms of the second operand are fast.
        forms_y = common + summed + columns, common + columns + summed
        form_y = of_y if of_y in forms_y else forms_y[0]
        return common + rows + summed, form_y, common + rows + columns

    def transposed(of_x, of_y):
        pairs = zip((of_x, of_y, of_result), form(of_x, of_y), strict=True)
        return sum(math.prod(sizes[axis] for axis in one) for one, other in pairs if one != other)

    if transposed(of_y, of_x) < transposed(of_x, of_y):
        x, y, of_x, of_y = y, x, of_y, of_x
    form_x, form_y, form_result = form(of_x, of_y)
    x, y = transpose(x, of_x, form_x), transpose(y, of_y, form_y)
    product = jnp.einsum(
        f"{form_x},{form_y}->{form_result}", x, y, preferred_element_type=jnp.float32
    )
    return transpose(product, form_result, of_result)


def transpose(array: Float[Array, "..."], before: str, after: str) -> Float[Array, "..."]:
    """Transposes an operand of a product, so that XLA does not move this into the product.

    For this, the last axis is split before and merged after.

    Args:
      array: the operand; not sharded, except inside `jax.shard_map`.
      before, after: letters of the axes.
    """
    if before == after:
        return array
    last = len(before) - 1
    order = [before.index(axis) for axis in after]
    odd = array.shape[last] % 2
    padded = jnp.pad(array, [(0, 0)] * last + [(0, odd)])
    split = padded.reshape(*array.shape[:last], 2, -1)
    split_order = order.copy()
    split_order.insert(order.index(last) + 1, last + 1)
    merged = jnp.transpose(split, split_order).reshape([padded.shape[axis] for axis in order])
    return jax.lax.slice_in_dim(merged, 0, array.shape[last], axis=order.index(last))


def _without_ellipsis(subscripts: str, ndim: int) -> str:
    """Replaces the `...` of the first operand, which has `ndim` axes, by letters."""
    if "..." not in subscripts:
        return subscripts
    named = len(subscripts.split(",")[0]) - len("...")
    free = [letter for letter in string.ascii_uppercase if letter not in subscripts]
    return subscripts.replace("...", "".join(free[: ndim - named]))


def on_cpu() -> bool:
    """Returns whether the devices of the current mesh are CPUs."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = jax.devices()[0].device_kind if device is None else device.device_kind
    return kind.lower() == "cpu"


@functools.cache
def _has_bfloat16_instructions(path: str = "/proc/cpuinfo") -> bool:
    """Returns whether Linux lists AMX or AVX512 instructions for bfloat16; elsewhere False."""
    try:
        words = Path(path).read_text().split()
    except OSError:
        return False
    return "amx_bf16" in words or "avx512_bf16" in words
