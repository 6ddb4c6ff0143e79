"""Lowers the engine's programs for devices that are not present, for `leon plan`."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from leon_jax import sharding
from leon_jax.engine.decode_loop import (
    DecodeState,
    Heads,
    PaddedPrompts,
    RowInputs,
    decode,
    init_state,
    output_sizes,
    prefill,
)
from leon_jax.engine.grammar import Grammar, GrammarState
from leon_jax.engine.kv_cache import CacheDtype
from leon_jax.engine.sampling_params import BatchedParams, SamplingParams
from leon_jax.models.decoder import Decoder
from leon_jax.vocabulary import Vocabulary


def lower_programs(
    decoder: Decoder,
    vocabulary: Vocabulary,
    rows: int,
    prompt_lengths: tuple[int, ...],
    grammar: Grammar,
    params: SamplingParams,
    cache_dtype: CacheDtype = "compute",
) -> tuple[DecodeState, Callable[[], jax.stages.Lowered], Callable[[], jax.stages.Lowered]]:
    """Prepares the engine's programs for a full batch on the current mesh, without running them.

    The devices of the mesh need not be present. They may be those of a topology.

    Args:
      decoder: the decoder; its arrays may be abstract.
      vocabulary: the decoder's id layout.
      rows: number of prompts, with one sample each; a multiple of the batch shards of the mesh.
      prompt_lengths: padded length of the prompts of each stream.
      grammar, params: the grammar and the sampling parameters of every row.
      cache_dtype: dtype of the cached keys and values.

    Returns:
      The abstract state; a function that lowers `prefill` of all rows; and a function that lowers
      `decode`.
    """
    streams, (spans, new_tokens) = len(prompt_lengths), output_sizes([grammar])
    inputs = RowInputs(
        GrammarState.of([[grammar]] * rows, streams, spans),
        BatchedParams.of([[params]] * rows, [params]),
        np.zeros((rows, 1, 2), np.uint32),  # type: ignore[arg-type]  # only its shape is used
    )
    mesh = jax.sharding.get_mesh()

    def array(shape: tuple[int, ...], dtype, *names: str) -> Any:
        layout = jax.NamedSharding(mesh, sharding.spec(*names))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout)

    inputs = jax.tree.map(lambda x: array(x.shape, x.dtype), inputs)
    state = jax.eval_shape(
        functools.partial(
            init_state,
            decoder.config,
            prompt_lengths=prompt_lengths,
            max_new_tokens=new_tokens,
            cache_dtype=cache_dtype,
            stacks=len(decoder.stacks),
        ),
        inputs,
    )
    heads = jax.eval_shape(lambda: Heads.of(decoder, vocabulary))
    prompts = [
        PaddedPrompts(
            array((rows, length), jnp.int32, "batch", "length"),
            array((rows, length), jnp.int32, "batch", "length"),
            array((rows, length), jnp.int32, "batch", "length"),
            array((rows,), jnp.int32, "batch"),
            array((rows,), jnp.int32, "batch"),
        )
        for length in prompt_lengths
    ]
    return (
        state,
        lambda: prefill.lower(decoder, state, array((rows,), jnp.int32), prompts, inputs),
        lambda: decode.lower(
            decoder, heads, state, array((rows,), jnp.bool_), array((), jnp.int32),
            vocabulary=vocabulary, text_size=None,
        ),
    )  # fmt: skip
