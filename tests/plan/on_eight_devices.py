"""Counts products that eight devices share; test_products.py runs this in a new process."""

import dataclasses
import json

import jax
import jax.numpy as jnp

from leon_jax import sharding
from leon_jax.plan import products
from leon_jax.plan.kinds import TracedStep
from tests.plan import test_products


def array(shape, *names):
    """Returns an abstract float32 array that is split over the current mesh."""
    layout = jax.NamedSharding(jax.sharding.get_mesh(), sharding.spec(*names))
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=layout)


def product(x, weight):
    """Rows are split over data and fsdp, columns over tensor; the weight is gathered over fsdp."""
    return jnp.einsum("be,em->bm", x, weight, out_sharding=sharding.spec("batch", "mlp"))


def main() -> None:
    counted = {}
    with jax.set_mesh(sharding.make_mesh((2, 2, 1, 2))):
        weight = array((8, 6), "weight_embed", "mlp")
        counted["split"] = test_products.count(product, array((16, 8), "batch", None), weight)
        whole = array((16, 8), None, None), array((8, 6), None, None)
        counted["repeated"] = test_products.count(lambda x, w: x @ w, *whole)
    with jax.set_mesh(sharding.make_mesh((4, 2, 1, 1))):
        for name, make in test_products.KINDS.items():
            kind = make()
            kind.config = dataclasses.replace(kind.config, batch_size=8)
            step = TracedStep.of(kind.program)
            counted[name] = products.count(step.traced.jaxpr.jaxpr)
    print(json.dumps({name: dataclasses.asdict(value) for name, value in counted.items()}))


if __name__ == "__main__":
    main()
