"""Plans of generation: the programs of `leon_jax.engine.decode_loop`, compiled for absent chips."""

import dataclasses

import jax
from flax import nnx

from leon_jax import sharding
from leon_jax.config import UserError
from leon_jax.engine import decode_loop
from leon_jax.engine.grammar import ImageSpan
from leon_jax.engine.guidance import make_guidance
from leon_jax.engine.kv_cache import CacheDtype
from leon_jax.engine.sampling_params import SamplingParams
from leon_jax.models.decoder import Decoder
from leon_jax.models.inference_weights import WeightType, convert_weights
from leon_jax.plan import plan as plans
from leon_jax.plan import roofline
from leon_jax.plan.plan import Plan, Roofline
from leon_jax.plan.topology import Topology
from leon_jax.train.decoder import check_divisible
from leon_jax.train.decoder_config import DecoderTraining

# Ids of a prompt that says nothing, padding included: the smallest bucket of the engine.
_BARE = 64


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is answered, and on which mesh.

    Attributes:
      mesh: sizes of (data, fsdp, context, tensor), without -1.
      rows: pictures drawn at once.
      guidance: weight; 1 is none, more takes two streams a row.
      prompt: tokens of a prompt, padding included; the unconditional stream has few.
      weights: their dtype.
      cache: the dtype of cached keys and values.
    """

    mesh: tuple[int, ...]
    rows: int
    guidance: float
    prompt: int
    weights: WeightType = "bfloat16"
    cache: CacheDtype = "compute"


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
    check_divisible(drawn, setting.mesh, batch_size="rows times streams")
    if setting.rows % (data * fsdp):
        raise UserError(f"--rows={setting.rows} must be a multiple of data x fsdp, {data * fsdp}")
    if setting.prompt + span.limit > model.max_length:
        raise UserError(
            f"--prompt={setting.prompt} and a picture of {span.limit} tokens are longer than "
            f"model.max_length, {model.max_length}"
        )
    slots = (setting.prompt, *[min(_BARE, setting.prompt)] * (guidance.streams - 1))
    mesh = sharding.make_mesh(setting.mesh, topology.devices)
    with jax.set_mesh(mesh):
        decoder = jax.eval_shape(
            lambda: convert_weights(Decoder(model, rngs=nnx.Rngs(0)), setting.weights)
        )
        state, prefill, decode = decode_loop.lower_programs(
            decoder,
            config.vocabulary,
            setting.rows,
            slots,
            (span,),
            SamplingParams(guidance),
            setting.cache,
        )
        held = {"parameters": decoder, "cache": state.caches}
        reading = plans.compile_for(prefill, held, topology)
        memory, found, seconds = plans.compile_for(decode, held, topology, span.limit)
    rows, shared = setting.rows / (data * fsdp), sum(slots) / len(slots)
    prompt_work = roofline.prefill_work(model, shared, rows * len(slots), tensor)
    ids = config.vocabulary.image_stop - config.vocabulary.image_start
    step = roofline.decode_work(
        model, shared + span.limit, ids, rows * len(slots), tensor, setting.weights, setting.cache
    )
    bounds = {
        "prefill": Roofline.of(prompt_work, plans.sent_bytes(reading[1]), topology),
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
