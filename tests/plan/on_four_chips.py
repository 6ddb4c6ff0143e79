"""Compiles a program with known traffic; test_collectives.py runs it in a new process."""

import dataclasses
import json

import jax
import jax.numpy as jnp

from leon_jax import sharding
from leon_jax.plan import topology
from leon_jax.plan.collectives import collectives

LAYERS, WIDTH, ROWS = 6, 1024, 512

pod = topology.find("v5e:2x2")
mesh = sharding.make_mesh((1, 4, 1, 1), pod.devices)


def program(weights, x):
    def layer(x, weight):
        return jnp.tanh(x @ jax.lax.all_gather(weight, "fsdp", tiled=True)), None

    x, _ = jax.lax.scan(layer, x, weights)
    return jax.lax.psum(x.astype(jnp.float32).sum(0), "fsdp")


with jax.set_mesh(mesh):
    sharded = jax.shard_map(
        program,
        in_specs=(jax.P(None, "fsdp", None), jax.P("fsdp", None)),
        out_specs=jax.P(None),
    )

    def array(shape, *names):
        layout = jax.NamedSharding(mesh, jax.P(*names))
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=layout)

    compiled = (
        jax.jit(sharded)
        .lower(array((LAYERS, WIDTH, WIDTH), None, "fsdp", None), array((ROWS, WIDTH), "fsdp"))
        .compile()
    )
counts = collectives(compiled.as_text())
print(json.dumps({kind: dataclasses.asdict(count) for kind, count in counts.items()}))
