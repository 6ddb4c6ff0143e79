"""The compiled programs of the engine, and the state of all rows that they share.

A row is one sample in the batch. `prefill` reads prompts into some groups of slots. `decode`
generates one id for each row in each step, until all rows of some group are finished. `finish` ends
all rows of some groups early.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from leon_jax import sharding
from leon_jax.engine.grammar import IMAGE, TEXT, Grammar, GrammarState, max_new_tokens
from leon_jax.engine.kv_cache import CacheDtype, KVCache, valid_slots
from leon_jax.engine.sampling_params import BatchedParams
from leon_jax.models.decoder import Decoder
from leon_jax.models.decoder_config import DecoderConfig
from leon_jax.vocabulary import Vocabulary

# The axes of new tokens and of spans are rounded up to multiples of these sizes, so that few
# programs are compiled.
_TOKENS_MULTIPLE, _SPANS_MULTIPLE = 32, 4


def output_sizes(grammars: Sequence[Grammar]) -> tuple[int, int]:
    """Returns the sizes of the axes of spans and of new tokens that hold any of these grammars.

    The sizes are rounded up to multiples of 4 spans and 32 tokens.

    Args:
      grammars: one or more grammars.
    """
    spans, tokens = max(map(len, grammars)), max(map(max_new_tokens, grammars))
    return (
        -(-spans // _SPANS_MULTIPLE) * _SPANS_MULTIPLE,
        -(-tokens // _TOKENS_MULTIPLE) * _TOKENS_MULTIPLE,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowInputs:
    """The inputs of all rows.

    Attributes:
      grammar: the grammar of each row, and the row's position in it.
      params: the sampling parameters of each row.
      seeds: the random key of each row as two words, uint32[group, sample, 2].
    """

    grammar: GrammarState
    params: BatchedParams
    seeds: UInt[Array, "group sample 2"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """The state of all rows, which the loop carries from step to step.

    Attributes:
      hidden: the decoder's output at the last id of each row, in the compute dtype.
      positions: the position of the next id of each row, int32.
      cells: the cell of the next id of each row if it is an image id: the number of image ids since
        the last other id, int32.
      caches: one KV cache for each stream.
      grammar, params, seeds: see `RowInputs`.
      tokens, scores: the generated ids of each row, int32, and the log-probability of each id,
        float32; 0 for an id that was not sampled. Entries from `counts` on are undefined.
      counts: the number of generated ids of each row, int32.
      failed: True if no id could be sampled for a row (see `SampledTokens`).
      step: the number of steps since `init_state`, int32.
    """

    hidden: Float[Array, "streams group sample embed"]
    positions: Int[Array, "streams group sample"]
    cells: Int[Array, "streams group sample"]
    caches: tuple[KVCache, ...]
    grammar: GrammarState
    params: BatchedParams
    seeds: UInt[Array, "group sample 2"]
    tokens: Int[Array, "group sample max_new_tokens"]
    scores: Float[Array, "group sample max_new_tokens"]
    counts: Int[Array, "group sample"]
    failed: Bool[Array, "group sample"]
    step: Int[Array, ""]


@functools.partial(
    jax.jit,
    static_argnames=("config", "prompt_lengths", "max_new_tokens", "cache_dtype", "stacks"),
)
def init_state(
    config: DecoderConfig,
    rows: RowInputs,
    prompt_lengths: tuple[int, ...],
    max_new_tokens: int,
    cache_dtype: CacheDtype = "compute",
    stacks: int = 1,
) -> DecodeState:
    """Returns the initial state, in which no row has read a prompt.

    Args:
      config: the decoder's configuration.
      rows: the inputs of all rows.
      prompt_lengths: the padded length of the longest prompt of each stream.
      max_new_tokens: maximum number of ids that a row generates.
      cache_dtype: dtype of the cached keys and values.
      stacks: the number of stacks of layers, `len(Decoder.stacks)`.
    """
    groups, samples, _ = rows.seeds.shape
    layout = sharding.spec(None, "batch", None, "embed")
    zeros = functools.partial(jnp.zeros, (groups, samples, max_new_tokens))
    return DecodeState(
        hidden=jnp.zeros(
            (len(prompt_lengths), groups, samples, config.embed), config.dtype, out_sharding=layout
        ),
        positions=jnp.zeros((len(prompt_lengths), groups, samples), jnp.int32),
        cells=jnp.zeros((len(prompt_lengths), groups, samples), jnp.int32),
        caches=tuple(
            KVCache.empty(config, groups, samples, length, max_new_tokens, cache_dtype, stacks)
            for length in prompt_lengths
        ),
        grammar=rows.grammar,
        params=rows.params,
        seeds=rows.seeds,
        tokens=zeros(jnp.int32),
        scores=zeros(jnp.float32),
        counts=jnp.zeros((groups, samples), jnp.int32),
        failed=jnp.zeros((groups, samples), bool),
        step=jnp.int32(0),
    )


class PaddedPrompts(NamedTuple):
    """Prompts of one stream, padded on the right.

    Attributes:
      ids, positions: ids and their positions, int32[new, bucket].
      cells: index of each image id in its image, -1 for other ids; see `Vocabulary.cells`.
      lengths: number of ids without padding, int32[new].
      extents: position of the first id after the prompt, int32[new].
    """

    ids: Int[Array, "new bucket"]
    positions: Int[Array, "new bucket"]
    cells: Int[Array, "new bucket"]
    lengths: Int[Array, "new"]
    extents: Int[Array, "new"]


@functools.partial(jax.jit, donate_argnames="state")
def prefill(
    decoder: Decoder,
    state: DecodeState,
    source: Int[Array, "group"],
    prompts: Sequence[PaddedPrompts],
    rows: RowInputs,
) -> DecodeState:
    """Reads new prompts into some groups, and returns the new state.

    Args:
      decoder: the decoder.
      state: the old state, which is donated.
      source: index of the new prompt of each group; -1: the group does not change.
      prompts: the new prompts of each stream.
      rows: the inputs of all rows. Only those of the groups with new prompts are used.
    """
    is_new = (source >= 0)[:, None]
    hidden, caches = [], []
    positions: list[Array] = []
    cells: list[Array] = []
    for stream, prompt in enumerate(prompts):
        states, keys, values = decoder.prefill(prompt.ids, prompt.positions, prompt.cells)
        is_last = jnp.arange(prompt.ids.shape[1]) == prompt.lengths[:, None] - 1
        is_last = jax.reshard(is_last, sharding.spec("batch", "length"))
        last = is_last.astype(states.dtype)
        ends = jnp.einsum("btd,bt->bd", states, last, out_sharding=jax.P(None, None))
        ends = jax.reshard(
            ends[jnp.maximum(source, 0)][:, None], sharding.spec("batch", None, None)
        )
        hidden.append(jnp.where(is_new[..., None], ends, state.hidden[stream]))
        next_cells = jnp.where(is_last, prompt.cells + 1, 0).sum(axis=1)
        for ends, old, new in (
            (prompt.extents, state.positions, positions),
            (next_cells, state.cells, cells),
        ):
            ends = jax.reshard(ends, jax.P(None))[jnp.maximum(source, 0)][:, None]
            new.append(jnp.where(is_new, ends, old[stream]))
        caches.append(state.caches[stream].insert(source, keys, values, prompt.lengths))

    def merge(new: Array, old: Array) -> Array:
        return jnp.where(is_new.reshape(is_new.shape + (1,) * (new.ndim - 2)), new, old)

    old_rows = RowInputs(state.grammar, state.params, state.seeds)
    merged = jax.tree.map(merge, rows, old_rows)
    return dataclasses.replace(
        state,
        hidden=jnp.stack(hidden),
        positions=jnp.stack(positions),
        cells=jnp.stack(cells),
        caches=tuple(caches),
        grammar=merged.grammar,
        params=merged.params,
        seeds=merged.seeds,
        counts=jnp.where(is_new, 0, state.counts),
        failed=state.failed & ~is_new,
    )


@functools.partial(jax.jit, donate_argnames="state")
def finish(state: DecodeState, groups: Bool[Array, "group"]) -> DecodeState:
    """Returns the state with all rows of these groups finished; `state` is donated."""
    rows = jnp.broadcast_to(groups[:, None], state.counts.shape)
    return dataclasses.replace(state, grammar=state.grammar.finish(rows))


class Heads(NamedTuple):
    """The output heads, in the compute dtype (see `Decoder.head`).

    Attributes:
      image: the head for the image ids.
      whole: the head for all ids that it has a row for (`DecoderConfig.head_ids`).
    """

    image: Float[Array, "embed image_ids"]
    whole: Float[Array, "embed ids"]

    @classmethod
    @functools.partial(jax.jit, static_argnums=(0, 2))
    def of(cls, decoder: Decoder, vocabulary: Vocabulary) -> "Heads":
        """Computes both heads. This happens once, outside the loop."""
        return cls(decoder.head(vocabulary.image_start, vocabulary.image_stop), decoder.head())


@functools.partial(jax.jit, static_argnames=("vocabulary", "text_size"), donate_argnames="state")
def decode(
    decoder: Decoder,
    heads: Heads,
    state: DecodeState,
    busy: Bool[Array, "group"],
    max_steps: Int[Array, ""],
    *,
    vocabulary: Vocabulary,
    text_size: int | None,
) -> DecodeState:
    """Runs decode steps until all rows of some busy group are finished, and returns the new state.

    Args:
      decoder: the decoder.
      heads: the decoder's output heads.
      state: the old state, which is donated.
      busy: True for the groups that hold a request.
      max_steps: maximum number of steps.
      vocabulary: the id layout.
      text_size: size of the text tokenizer. Text ids beyond it are never sampled. None: all text
        ids of the vocabulary may be sampled.
    """
    last_step = state.step + max_steps

    def is_running(state: DecodeState) -> Bool[Array, ""]:
        return (state.step < last_step) & ~(busy & state.grammar.done.all(axis=1)).any()

    return jax.lax.while_loop(
        is_running,
        lambda state: feed_tokens(
            decoder,
            state,
            sample_tokens(decoder, state, heads, vocabulary, text_size),
            vocabulary,
        ),
        state,
    )


class SampledTokens(NamedTuple):
    """One id for each row.

    Attributes:
      ids: ids of the joint vocabulary, int32. They are undefined if a row is not inside an image
        or a text.
      scores: log-probability of the id under stream 0, normalised over the ids that the grammar
        allows, in nats.
      failed: True if no id could be sampled: the sampler returned an id that the grammar does not
        allow, or whose logit is NaN or -inf.
    """

    ids: Int[Array, "group sample"]
    scores: Float[Array, "group sample"]
    failed: Bool[Array, "group sample"]


def sample_tokens(
    decoder: Decoder,
    state: DecodeState,
    heads: Heads,
    vocabulary: Vocabulary,
    text_size: int | None,
) -> SampledTokens:
    """Samples an id for each row that is inside an image or a text.

    Only logits that some row needs are computed. If some row is inside an image, these are the
    logits of the image ids in all streams. If some row is inside a text, these are the logits of
    all ids in stream 0. The id of a row does not depend on the other rows. Its random key depends
    on the row's seed and on the number of ids that the row has generated.
    """
    current, params, used = state.grammar.current, state.params, state.grammar.used
    keys = jax.random.wrap_key_data(state.seeds, impl="threefry2x32")
    keys = jax.vmap(jax.vmap(jax.random.fold_in))(keys, state.counts)

    def replicate(logits: Array) -> Array:
        # Every device gets all logits of a step, because they are small. Rows and streams can then
        # be indexed regardless of their sharding.
        return jax.reshard(logits, jax.P(*[None] * logits.ndim)).astype(jnp.float32)

    def score(logits: Array, ids: Array) -> Array:
        likelihoods = jax.nn.log_softmax(logits, axis=-1)
        return jnp.take_along_axis(likelihoods, ids[..., None], axis=-1)[..., 0]

    def sample_image() -> tuple[Array, Array, Array]:
        logits = replicate(decoder.logits(state.hidden, heads.image))
        ids, usable = params.sample_image(logits, used, keys)
        return ids + vocabulary.image_start, score(logits[0], ids), ~usable

    def sample_text() -> tuple[Array, Array, Array]:
        first, stop = decoder.config.head_ids
        ids = jnp.arange(first, stop)
        text_stop = vocabulary.text_start + (text_size or vocabulary.text_tokens)
        may_stop = (used >= current.min_tokens)[..., None]
        is_stop = (ids == current.stops[..., None]).any(axis=-2) & may_stop
        allowed = ((ids >= vocabulary.text_start) & (ids < text_stop)) | is_stop
        logits = replicate(decoder.logits(state.hidden[0], heads.whole))
        logits = jnp.where(allowed, logits, -jnp.inf)
        sampled, usable = params.sample_text(logits, keys)
        return sampled + first, score(logits, sampled), ~usable

    def skip() -> tuple[Array, Array, Array]:
        zeros = jnp.zeros_like(state.counts)
        return zeros, zeros.astype(jnp.float32), zeros.astype(bool)

    is_image, is_text = current.kind == IMAGE, current.kind == TEXT
    image = jax.lax.cond(is_image.any(), sample_image, skip)
    text = jax.lax.cond(is_text.any(), sample_text, skip)
    ids, scores, unusable = (jnp.where(is_image, *both) for both in zip(image, text, strict=True))
    # A text at its length limit is closed, and the id sampled for it is ignored.
    is_sampled = is_image | (is_text & (used < current.limit))
    return SampledTokens(ids, scores, unusable & is_sampled)


def feed_tokens(
    decoder: Decoder, state: DecodeState, sampled: SampledTokens, vocabulary: Vocabulary
) -> DecodeState:
    """Feeds each unfinished row its next id, and returns the new state.

    The id is the sampled one, or one that the grammar forces. All streams of the row read it; if no
    row has a guided id left, only stream 0 does. A failed row gets no id and is finished.
    """
    active = ~state.grammar.done & ~sampled.failed
    grammar, written, was_sampled = state.grammar.advance(sampled.ids)
    grammar = grammar.finish(sampled.failed)
    is_next = (jnp.arange(state.tokens.shape[-1]) == state.counts[..., None]) & active[..., None]
    streams, ring_size = len(state.caches), state.caches[0].ring_size
    ids = jax.reshard(written, jax.P(None, *sharding.spec("batch"), None))
    is_image = vocabulary.is_image(written)
    positions, cells = (
        jax.reshard(each, jax.typeof(ids).sharding.spec)
        for each in (state.positions, jnp.where(is_image, state.cells, -1))
    )
    valid = valid_slots(ring_size, state.step, state.counts)

    def read(count: int) -> tuple[Array, list[Array], list[Array]]:
        """Runs the decoder on the ids in the first `count` streams.

        The other streams keep their hidden states, and get zeros as keys and values.
        """
        hidden, keys, values = decoder.decode_step(
            ids[:count],
            positions[:count],
            [cache.prompt() for cache in state.caches[:count]],
            [cache.output(valid) for cache in state.caches[:count]],
            cells[:count],
        )
        hidden = jnp.concatenate([hidden.astype(state.hidden.dtype), state.hidden[count:]])
        missing = ((0, 0), (0, streams - count), (0, 0), (0, 0), (0, 0), (0, 0))
        keys, values = ([jnp.pad(each, missing) for each in both] for both in (keys, values))
        return hidden, keys, values

    if streams == 1:
        hidden, keys, values = read(1)
    else:
        # Only guidance uses the other streams. They are not computed after the last guided id.
        in_image = grammar.current.kind == IMAGE
        is_later = jnp.arange(grammar.kind.shape[-1]) > grammar.span[..., None]
        has_later_image = ((grammar.kind == IMAGE) & is_later).any(axis=-1)
        used = jnp.where(in_image, grammar.used, 2**30)
        needed = state.params.needs_guidance(used, has_later_image)
        hidden, keys, values = jax.lax.cond(needed.any(), lambda: read(streams), lambda: read(1))
    # The barrier puts all reads of the caches before the writes, so that the writes are in place.
    caches, hidden = jax.lax.optimization_barrier((state.caches, hidden))
    after = state.positions + 1
    part_step = decoder.config.part_step
    after = jnp.where(written == vocabulary.break_id, after + -after % part_step, after)
    return dataclasses.replace(
        state,
        hidden=hidden,
        positions=jnp.where(active, after, state.positions),
        cells=jnp.where(active, jnp.where(is_image, state.cells + 1, 0), state.cells),
        caches=tuple(
            cache.append(
                state.step, [each[:, stream] for each in keys], [each[:, stream] for each in values]
            )
            for stream, cache in enumerate(caches)
        ),
        grammar=grammar,
        tokens=jnp.where(is_next, written[0][..., None], state.tokens),
        scores=jnp.where(
            is_next, jnp.where(was_sampled, sampled.scores, 0)[..., None], state.scores
        ),
        counts=state.counts + active,
        failed=state.failed | sampled.failed,
        step=state.step + 1,
    )


def replicate(tree: Any) -> Any:
    """Copies a tree of small arrays to every device of the current mesh."""
    layout = jax.NamedSharding(jax.sharding.get_mesh(), jax.P())
    return jax.tree.map(lambda x: jax.device_put(x, layout), tree)


def round_up_rows(rows: int) -> int:
    """Rounds `rows` up to a multiple of the batch shards (data x fsdp) of the current mesh."""
    shape = jax.sharding.get_mesh().shape
    shards = shape.get("data", 1) * shape.get("fsdp", 1)
    return -(-rows // shards) * shards
