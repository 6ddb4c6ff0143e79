"""Plans image generation: compiles the programs of `leon_jax.engine.decode_loop` for a topology."""

import dataclasses

import jax
from flax import nnx

from leon_jax import sharding
from leon_jax.config import UserError
from leon_jax.engine import lowering
from leon_jax.engine.grammar import ImageSpan
from leon_jax.engine.guidance import make_guidance
from leon_jax.engine.kv_cache import CacheDtype
from leon_jax.engine.sampling_params import SamplingParams
from leon_jax.models.decoder import Decoder
from leon_jax.models.weight_conversion import WeightType, convert_weights
from leon_jax.plan import plan as plans
from leon_jax.plan import roofline
from leon_jax.plan.plan import Plan, Roofline
from leon_jax.plan.topology import Topology
from leon_jax.train.decoder import check_divisible
from leon_jax.train.decoder_config import DecoderTraining

# Tokens of an unconditional prompt with padding: the engine's smallest bucket.
_UNCONDITIONAL_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class Setting:
    """The batch and the mesh of a plan.

    Attributes:
      mesh: sizes of the axes (data, fsdp, context, tensor), without -1.
      rows: images in a batch.
      guidance: classifier-free guidance weight; other values than 1 need two streams a row.
      prompt: tokens of a prompt with padding; the unconditional stream has at most 64.
      weights: dtype of the weights.
      cache: dtype of cached keys and values; "compute" is the model's dtype.
    """

    mesh: tuple[int, ...]
    rows: int
    guidance: float
    prompt: int
    weights: WeightType = "bfloat16"
    cache: CacheDtype = "compute"


def plan(config: DecoderTraining, topology: Topology, setting: Setting) -> Plan:
    """Compiles the generation of `rows` images: the prefill and the loop over image tokens.

    Raises:
      UserError: the mesh cannot split the rows evenly, or prompt and image exceed the context.
      DoesNotFit: the program needs more memory than a device has.
    """
    model, span = config.model, ImageSpan(config.data.image_shape[0] * config.data.image_shape[1])
    guidance = make_guidance(setting.guidance)
    data, fsdp, _, tensor = setting.mesh
    batch = setting.rows * guidance.streams
    batch_config = dataclasses.replace(config, batch_size=batch, microbatches=1)
    check_divisible(batch_config, setting.mesh, batch_size="rows times streams")
    if setting.rows % (data * fsdp):
        raise UserError(f"--rows={setting.rows} must be a multiple of data x fsdp, {data * fsdp}")
    if setting.prompt + span.limit > model.max_length:
        raise UserError(
            f"--prompt={setting.prompt} and an image of {span.limit} tokens are longer than "
            f"model.max_length, {model.max_length}"
        )
    slots = (setting.prompt, *[min(_UNCONDITIONAL_TOKENS, setting.prompt)] * (guidance.streams - 1))
    mesh = sharding.make_mesh(setting.mesh, topology.devices)
    with jax.set_mesh(mesh):
        decoder = jax.eval_shape(
            lambda: convert_weights(Decoder(model, rngs=nnx.Rngs(0)), setting.weights)
        )
        state, prefill, decode = lowering.lower_programs(
            decoder,
            config.vocabulary,
            setting.rows,
            slots,
            (span,),
            SamplingParams(guidance),
            setting.cache,
        )
        arrays = {"parameters": decoder, "cache": state.caches}
        _, prefill_collectives, _ = plans.compile_for(prefill, arrays, topology)
        memory, decode_collectives, seconds = plans.compile_for(
            decode, arrays, topology, span.limit
        )
    rows, mean_prompt = setting.rows / (data * fsdp), sum(slots) / len(slots)
    prefill_work = roofline.prefill_work(model, mean_prompt, rows * len(slots), tensor)
    ids = config.vocabulary.image_stop - config.vocabulary.image_start
    step_work = roofline.decode_work(
        model,
        mean_prompt + span.limit,
        ids,
        rows * len(slots),
        tensor,
        setting.weights,
        setting.cache,
    )
    step_bytes = plans.sent_bytes(decode_collectives) / span.limit
    bounds = {
        "prefill": Roofline.of(prefill_work, plans.sent_bytes(prefill_collectives), topology),
        "token": Roofline.of(step_work, step_bytes, topology),
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
        collectives=decode_collectives,
        rooflines=bounds,
        figures={
            "seconds_per_batch": total,
            "pictures_per_second": setting.rows / total,
            "tokens_per_second": setting.rows * span.limit / total,
        },
        compile_seconds=seconds,
    )
