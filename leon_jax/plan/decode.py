"""Plans of answering: the very program of `leon_jax.decode.engine`, compiled for absent chips."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from leon_jax import sharding
from leon_jax.config import UserError
from leon_jax.decode import engine
from leon_jax.decode.grammar import ImageSpan
from leon_jax.decode.guidance import make_guidance
from leon_jax.decode.sampling import Categorical
from leon_jax.models.decoder import Decoder
from leon_jax.plan import plan as plans
from leon_jax.plan import roofline
from leon_jax.plan.plan import Plan, Roofline
from leon_jax.plan.topology import Topology
from leon_jax.train.decoder_config import DecoderTraining
from leon_jax.train.decoder_step import uneven


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is answered, and on which mesh.

    Attributes:
      mesh: sizes of (data, fsdp, context, tensor), without -1.
      rows: pictures drawn at once.
      guidance: weight; 1 is none, more takes two streams a row.
      prompt: tokens of a prompt, padding included.
    """

    mesh: tuple[int, ...]
    rows: int
    guidance: float
    prompt: int


def plan(config: DecoderTraining, topology: Topology, setting: Setting) -> Plan:
    """Compiles drawing `rows` pictures: prefill, and the loop over the codes of a picture.

    Raises:
      UserError: the rows cannot be dealt to the mesh, or prompt and picture exceed the context.
      DoesNotFit: it needs more memory than a device has.
    """
    model, span = config.model, ImageSpan(config.data.image_shape[0] * config.data.image_shape[1])
    guidance = make_guidance(setting.guidance)
    data, fsdp, _, tensor = setting.mesh
    batch = setting.rows * guidance.streams
    drawn = dataclasses.replace(config, batch_size=batch, microbatches=1)
    if problem := uneven(drawn, setting.mesh, 1):
        raise UserError(problem.replace("config.batch_size", "rows times streams"))
    if setting.rows % (data * fsdp):
        raise UserError(f"--rows={setting.rows} must be a multiple of data x fsdp, {data * fsdp}")
    if setting.prompt + span.limit > model.max_length:
        raise UserError(
            f"--prompt={setting.prompt} and a picture of {span.limit} tokens are longer than "
            f"model.max_length, {model.max_length}"
        )
    mesh = sharding.make_mesh(setting.mesh, topology.devices)
    with jax.set_mesh(mesh):

        def array(shape: tuple[int, ...], dtype, *names: str) -> jax.ShapeDtypeStruct:
            layout = jax.NamedSharding(mesh, sharding.spec(*names))
            return jax.ShapeDtypeStruct(shape, dtype, sharding=layout)

        decoder = jax.eval_shape(lambda: Decoder(model, rngs=nnx.Rngs(0)))
        tokens = array((batch, setting.prompt), jnp.int32, "batch", "length")
        counts = array((batch,), jnp.int32, "batch")
        seeds = jax.ShapeDtypeStruct(
            (setting.rows,), jnp.uint32, sharding=jax.NamedSharding(mesh, jax.P())
        )
        memory, found, seconds = plans.compile_for(
            lambda: engine.fill_program(
                decoder,
                tokens,
                tokens,
                counts,
                counts,
                seeds,
                guidance,
                Categorical(),
                span,
                config.vocabulary,
            ),
            {"parameters": decoder},
            topology,
        )
    rows = batch / (data * fsdp)
    prefill = roofline.prefill_work(model, setting.prompt, rows, tensor)
    slots, (start, stop) = setting.prompt + span.limit, span.bounds(config.vocabulary)
    step = roofline.decode_work(model, slots, stop - start, rows, tensor)
    # Which collectives belong to the loop is not told apart: all but what one run of a layer scan
    # needs do, so they are booked there.
    bounds = {
        "prefill": Roofline.of(prefill, 0.0, topology),
        "token": Roofline.of(step, plans.sent_bytes(found) / span.limit, topology),
    }
    total = bounds["prefill"].seconds + span.limit * bounds["token"].seconds
    return Plan(
        program="decode",
        topology=topology.name,
        chips=topology.chips,
        devices=len(topology.devices),
        setting=dataclasses.asdict(setting),
        parameters=model.parameter_count(),
        memory=memory,
        collectives=found,
        rooflines=bounds,
        figures={
            "seconds_per_batch": total,
            "pictures_per_second": setting.rows / total,
            "tokens_per_second": setting.rows * span.limit / total,
        },
        compile_seconds=seconds,
    )
