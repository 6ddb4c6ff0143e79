"""Counts the matrix products and convolutions of a traced function.

The counts come from the shapes in the function's jaxpr, so they follow every change of a model.
XLA's own analysis counts the body of a loop once; here a scan counts once per iteration. A loop
whose end depends on data counts as one iteration. Of a conditional only the branch with the most
operations counts. Nothing else is counted, so the results are lower bounds.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Self

import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn


@dataclasses.dataclass(frozen=True)
class Products:
    """The products of one execution of a function.

    Attributes:
      flops: floating-point operations, two for each multiplication and addition; work that several
        devices repeat counts once.
      device_flops: operations of one device.
      device_bytes: bytes of the operands and results of the products on one device.
    """

    flops: float = 0.0
    device_flops: float = 0.0
    device_bytes: float = 0.0

    def __add__(self, other: Self) -> Self:
        return type(self)(
            self.flops + other.flops,
            self.device_flops + other.device_flops,
            self.device_bytes + other.device_bytes,
        )

    def __sub__(self, other: Self) -> Self:
        return self + other * -1

    def __mul__(self, times: float) -> Self:
        return type(self)(self.flops * times, self.device_flops * times, self.device_bytes * times)


def count(jaxpr: Jaxpr) -> Products:
    """Counts the products of a jaxpr, and of the functions that it calls.

    An array that is split over a mesh axis is split evenly over its devices. A product is split
    over all mesh axes that split its operands or its result.
    """
    total = Products()
    for equation in jaxpr.eqns:
        match equation.primitive.name:
            case "dot_general":
                total += _product(equation, _dot_flops(equation))
            case "conv_general_dilated":
                total += _product(equation, _convolution_flops(equation))
            case "cond":
                branches = map(count, _called(equation))
                total += max(branches, key=lambda branch: branch.flops)
            case name:
                times = equation.params["length"] if name == "scan" else 1
                for called in _called(equation):
                    total += count(called) * times
    return total


def _called(equation: JaxprEqn) -> Iterator[Jaxpr]:
    """Yields the jaxprs in the parameters of an equation."""
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            jaxpr = getattr(item, "jaxpr", item)  # of a closed one
            if isinstance(jaxpr, Jaxpr):
                yield jaxpr


def _product(equation: JaxprEqn, flops: float) -> Products:
    operands, result = _arrays(equation)
    arrays = [*operands, result]
    axes: dict[str, int] = {}
    for array in arrays:
        axes |= _split_axes(array)
    local = (
        math.prod(array.shape) * np.dtype(array.dtype).itemsize
        / math.prod(_split_axes(array).values())
        for array in arrays
    )  # fmt: skip
    return Products(flops, flops / math.prod(axes.values()), sum(local))


def _arrays(equation: JaxprEqn) -> tuple[list[Any], Any]:
    """Returns the abstract operands and the abstract result of a product."""
    return [variable.aval for variable in equation.invars], equation.outvars[0].aval


def _split_axes(array: Any) -> dict[str, int]:
    """Returns the names and sizes of the mesh axes that split an abstract array."""
    sizes = dict(array.sharding.mesh.shape)
    names: list[str] = []
    for entry in array.sharding.spec:
        names += entry if isinstance(entry, tuple) else [entry] if isinstance(entry, str) else []
    return {name: sizes[name] for name in names}


def _dot_flops(equation: JaxprEqn) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    (left, _), result = _arrays(equation)
    return 2.0 * math.prod(result.shape) * math.prod(left.shape[axis] for axis in contracted)


def _convolution_flops(equation: JaxprEqn) -> float:
    parameters = equation.params
    image, kernel, result = parameters["dimension_numbers"]
    operands, results = _arrays(equation)
    image_shape, kernel_shape, result_shape = (*(x.shape for x in operands), results.shape)
    pairs = 1
    for axis, (low, _) in enumerate(parameters["padding"]):
        pairs *= _pairs(
            image_shape[image[2 + axis]],
            kernel_shape[kernel[2 + axis]],
            result_shape[result[2 + axis]],
            parameters["window_strides"][axis],
            low,
            parameters["lhs_dilation"][axis],
            parameters["rhs_dilation"][axis],
        )
    # The first two axes of the numbers are batch and channels; of a kernel, outputs and inputs.
    others = result_shape[result[0]] * result_shape[result[1]] * kernel_shape[kernel[1]]
    return 2.0 * others * pairs


def _pairs(
    size: int, kernel: int, results: int, stride: int, low: int, dilation: int, kernel_dilation: int
) -> int:
    """Returns how often a kernel's element meets a pixel, along one axis.

    Padding and the gaps of a dilated image are zeros, which need no multiplication.

    Args:
      size: pixels along the axis.
      kernel: elements of the kernel.
      results: positions of the kernel.
      stride: pixels between two positions.
      low: padding before the first pixel.
      dilation, kernel_dilation: distance between two pixels, and between two of the kernel's
        elements.
    """
    positions = np.arange(results)[:, None] * stride + np.arange(kernel) * kernel_dilation - low
    is_inside = (positions >= 0) & (positions <= (size - 1) * dilation)
    return int((is_inside & (positions % dilation == 0)).sum())
