"""The compiled programs of the engine, and the state that they carry: everything of every row.

`begin` reads prompts into some groups of slots; `advance` writes, one id a row and step, until a
group is done.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from leon_jax import sharding
from leon_jax.decode.cache import Cache, CacheType, own
from leon_jax.decode.grammar import IMAGE, TEXT, Rows, Script, longest, rows_of
from leon_jax.decode.strategy import Strategies, Strategy
from leon_jax.models.decoder import Decoder, DecoderConfig
from leon_jax.vocabulary import Vocabulary

# Lengths of rings and scripts are rounded up to multiples of these, so that few are compiled.
_RING, _SPANS = 32, 4


def sizes(scripts: Sequence[Script]) -> tuple[int, int]:
    """How many spans and how many ids there is room for, rounded up."""
    spans, ids = max(map(len, scripts)), max(map(longest, scripts))
    return -(-spans // _SPANS) * _SPANS, -(-ids // _RING) * _RING


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Work:
    """What every row is to do: its script, its strategy, and the words of its random key."""

    rows: Rows
    strategies: Strategies
    seeds: UInt[Array, "group sample 2"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What the loop carries.

    Attributes:
      hidden: of the last id of every row.
      positions: of the next id of every row.
      caches: one a stream.
      rows, strategies, seeds: what every row is to do, and where it stands.
      tokens, scores: what it wrote, and the log-probability of each id.
      counts: how many ids that is.
      step: how many steps have been made.
    """

    hidden: Float[Array, "streams group sample embed"]
    positions: Int[Array, "streams group sample"]
    caches: tuple[Cache, ...]
    rows: Rows
    strategies: Strategies
    seeds: UInt[Array, "group sample 2"]
    tokens: Int[Array, "group sample ring"]
    scores: Float[Array, "group sample ring"]
    counts: Int[Array, "group sample"]
    step: Int[Array, ""]


@functools.partial(jax.jit, static_argnames=("config", "slots", "ring", "kept", "pieces"))
def empty(
    config: DecoderConfig,
    rows: Work,
    slots: tuple[int, ...],
    ring: int,
    kept: CacheType = "compute",
    pieces: int = 1,
) -> State:
    """The state in which the rows have read nothing.

    Args:
      config: the model.
      rows: what they are to do.
      slots: the longest prompt of each stream.
      ring: the longest answer.
      kept: what the cache keeps keys and values in.
      pieces: how many the decoder has.
    """
    groups, samples, _ = rows.seeds.shape
    wide = sharding.spec(None, "batch", None, "embed")
    zeros = functools.partial(jnp.zeros, (groups, samples, ring))
    return State(
        hidden=jnp.zeros(
            (len(slots), groups, samples, config.embed), config.dtype, out_sharding=wide
        ),
        positions=jnp.zeros((len(slots), groups, samples), jnp.int32),
        caches=tuple(
            Cache.empty(config, groups, samples, each, ring, kept, pieces) for each in slots
        ),
        rows=rows.rows,
        strategies=rows.strategies,
        seeds=rows.seeds,
        tokens=zeros(jnp.int32),
        scores=zeros(jnp.float32),
        counts=jnp.zeros((groups, samples), jnp.int32),
        step=jnp.int32(0),
    )


class Padded(NamedTuple):
    """Prompts of one stream, padded on the right.

    Attributes:
      ids, positions: int32[new, bucket].
      lengths: int32[new], how many of the ids count.
      extents: int32[new], the position of an id that would follow.
    """

    ids: Int[Array, "new bucket"]
    positions: Int[Array, "new bucket"]
    lengths: Int[Array, "new"]
    extents: Int[Array, "new"]


@functools.partial(jax.jit, donate_argnames="state")
def begin(
    decoder: Decoder,
    state: State,
    source: Int[Array, "group"],
    prompts: Sequence[Padded],
    rows: Work,
) -> State:
    """The state with new prompts in the groups whose `source` is not -1."""
    fresh = (source >= 0)[:, None]
    hidden, positions, caches = [], [], []
    for number, prompt in enumerate(prompts):
        states, keys, values = decoder.prefill(prompt.ids, prompt.positions)
        last = jax.nn.one_hot(prompt.lengths - 1, prompt.ids.shape[1], dtype=states.dtype)
        last = jax.reshard(last, sharding.spec("batch", "length"))
        ends = jnp.einsum("btd,bt->bd", states, last, out_sharding=jax.P(None, None))
        ends = jax.reshard(
            ends[jnp.maximum(source, 0)][:, None], sharding.spec("batch", None, None)
        )
        hidden.append(jnp.where(fresh[..., None], ends, state.hidden[number]))
        extents = jax.reshard(prompt.extents, jax.P(None))[jnp.maximum(source, 0)][:, None]
        positions.append(jnp.where(fresh, extents, state.positions[number]))
        caches.append(state.caches[number].insert(source, keys, values, prompt.lengths))

    def renewed(new: Array, old: Array) -> Array:
        return jnp.where(fresh.reshape(fresh.shape + (1,) * (new.ndim - 2)), new, old)

    old = Work(state.rows, state.strategies, state.seeds)
    given = jax.tree.map(renewed, rows, old)
    return dataclasses.replace(
        state,
        hidden=jnp.stack(hidden),
        positions=jnp.stack(positions),
        caches=tuple(caches),
        rows=given.rows,
        strategies=given.strategies,
        seeds=given.seeds,
        counts=jnp.where(fresh, 0, state.counts),
    )


class Heads(NamedTuple):
    """What scores the ids of pictures, and all ids; see `Decoder.head`."""

    image: Float[Array, "embed image_ids"]
    whole: Float[Array, "embed ids"]

    @classmethod
    @functools.partial(jax.jit, static_argnums=(0, 2))
    def of(cls, decoder: Decoder, vocabulary: Vocabulary) -> "Heads":
        """Both, to be made once."""
        return cls(decoder.head(vocabulary.image_start, vocabulary.image_stop), decoder.head())


@functools.partial(jax.jit, static_argnames=("vocabulary", "text_tokens"), donate_argnames="state")
def advance(
    decoder: Decoder,
    heads: Heads,
    state: State,
    busy: Bool[Array, "group"],
    steps: Int[Array, ""],
    *,
    vocabulary: Vocabulary,
    text_tokens: int | None,
) -> State:
    """Runs until one of the groups that are busy is done, or `steps` steps are made."""
    end = state.step + steps

    def unfinished(state: State) -> Bool[Array, ""]:
        return (state.step < end) & ~(busy & state.rows.done.all(axis=1)).any()

    def step(state: State) -> State:
        drawn, scores = _draw(decoder, state, heads, vocabulary, text_tokens)
        return _write(decoder, state, drawn, scores, vocabulary)

    return jax.lax.while_loop(unfinished, step, state)


def _draw(
    decoder: Decoder,
    state: State,
    heads: Heads,
    vocabulary: Vocabulary,
    text_tokens: int | None,
) -> tuple[Int[Array, "group sample"], Float[Array, "group sample"]]:
    """An id for each row, and its log-probability under stream 0 within the grammar.

    Only what some row needs is computed: the image slice of the head, or all of it. An id is drawn
    in the same way whatever the other rows are at.
    """
    now, strategies = state.rows.now, state.strategies
    keys = jax.random.wrap_key_data(state.seeds, impl="threefry2x32")
    keys = jax.vmap(jax.vmap(jax.random.fold_in))(keys, state.counts)

    def whole(logits: Array) -> Array:
        # Every device holds all logits of a step: they are few, and rows and streams can then be
        # taken apart without regard to how they are split.
        return jax.reshard(logits, jax.P(*[None] * logits.ndim)).astype(jnp.float32)

    def scored(logits: Array, ids: Array) -> Array:
        likelihood = jax.nn.log_softmax(logits, axis=-1)
        return jnp.take_along_axis(likelihood, ids[..., None], axis=-1)[..., 0]

    def image() -> tuple[Array, Array]:
        logits = whole(decoder.logits(state.hidden, heads.image))
        ids = strategies.draw_image(logits, now.used, keys)
        return ids + vocabulary.image_start, scored(logits[0], ids)

    def text() -> tuple[Array, Array]:
        ids = jnp.arange(vocabulary.size)
        last = vocabulary.text_start + (text_tokens or vocabulary.text_tokens)
        stops = (ids == now.stops[..., None]).any(axis=-2) & (now.used >= now.least)[..., None]
        allowed = ((ids >= vocabulary.text_start) & (ids < last)) | stops
        logits = jnp.where(allowed, whole(decoder.logits(state.hidden[0], heads.whole)), -jnp.inf)
        drawn = strategies.draw_text(logits, keys)
        return drawn, scored(logits, drawn)

    def nothing() -> tuple[Array, Array]:
        return jnp.zeros_like(state.counts), jnp.zeros(state.counts.shape, jnp.float32)

    picture, written = now.kind == IMAGE, now.kind == TEXT
    image_ids, image_scores = jax.lax.cond(picture.any(), image, nothing)
    text_ids, text_scores = jax.lax.cond(written.any(), text, nothing)
    return (
        jnp.where(picture, image_ids, text_ids),
        jnp.where(picture, image_scores, text_scores),
    )


def _write(
    decoder: Decoder,
    state: State,
    drawn: Int[Array, "group sample"],
    scores: Float[Array, "group sample"],
    vocabulary: Vocabulary,
) -> State:
    """The state after each row was given its id, and every stream of it has read it."""
    active = ~state.rows.done
    rows, written, was_drawn = state.rows.advance(drawn)
    here = (jnp.arange(state.tokens.shape[-1]) == state.counts[..., None]) & active[..., None]
    streams, ring = len(state.caches), state.caches[0].ring
    ids = jax.reshard(written, jax.P(None, *sharding.spec("batch"), None))
    positions = jax.reshard(state.positions, jax.typeof(ids).sharding.spec)
    seen = own(ring, state.step, state.counts)

    def read_by(number: int) -> tuple[Array, list[Array], list[Array]]:
        hidden, keys, values = decoder.decode_step(
            ids[:number],
            positions[:number],
            [cache.prompt() for cache in state.caches[:number]],
            [cache.answer(seen) for cache in state.caches[:number]],
        )
        hidden = jnp.concatenate([hidden.astype(state.hidden.dtype), state.hidden[number:]])
        more = ((0, 0), (0, streams - number), (0, 0), (0, 0), (0, 0), (0, 0))
        keys, values = ([jnp.pad(each, more) for each in both] for both in (keys, values))
        return hidden, keys, values

    if streams == 1:
        hidden, keys, values = read_by(1)
    else:
        # The other streams serve guidance alone: past the last guided id they are left out.
        now = rows.now
        later = (rows.kind == IMAGE) & (jnp.arange(rows.kind.shape[-1]) > rows.place[..., None])
        used = jnp.where(now.kind == IMAGE, now.used, 2**30)
        ahead = state.strategies.guided(used, later.any(axis=-1))
        hidden, keys, values = jax.lax.cond(
            ahead.any(), lambda: read_by(streams), lambda: read_by(1)
        )
    # All reads of the caches come before the writes, so that the writes are in place.
    caches, hidden = jax.lax.optimization_barrier((state.caches, hidden))
    after = state.positions + 1
    step = decoder.config.part_step
    after = jnp.where(written == vocabulary.break_id, after + -after % step, after)
    return dataclasses.replace(
        state,
        hidden=hidden,
        positions=jnp.where(active, after, state.positions),
        caches=tuple(
            cache.append(
                state.step, [each[:, number] for each in keys], [each[:, number] for each in values]
            )
            for number, cache in enumerate(caches)
        ),
        rows=rows,
        tokens=jnp.where(here, written[0][..., None], state.tokens),
        scores=jnp.where(here, jnp.where(was_drawn, scores, 0)[..., None], state.scores),
        counts=state.counts + active,
        step=state.step + 1,
    )


def programs(
    decoder: Decoder,
    vocabulary: Vocabulary,
    rows: int,
    slots: tuple[int, ...],
    script: Script,
    strategy: Strategy,
    kept: CacheType = "compute",
) -> tuple[State, Callable[[], jax.stages.Lowered], Callable[[], jax.stages.Lowered]]:
    """What `Engine` runs for a full batch, to be compiled for absent devices.

    Args:
      decoder: may be abstract.
      vocabulary: its id layout.
      rows: prompts, each answered once; a multiple of what the mesh splits the batch into.
      slots: padded length of the prompts, by stream.
      script, strategy: of all rows.
      kept: see `empty`.

    Returns:
      The abstract state; what lowers the program that reads all prompts; and the one that writes.
    """
    streams, (spans, ring) = len(slots), sizes([script])
    layout = Work(
        rows_of([[script]] * rows, streams, spans),
        Strategies.of([[strategy]] * rows, [strategy]),
        np.zeros((rows, 1, 2), np.uint32),  # type: ignore[arg-type]  # nothing is on a device
    )
    mesh = jax.sharding.get_mesh()

    def array(shape: tuple[int, ...], dtype, *names: str) -> Any:
        layout = jax.NamedSharding(mesh, sharding.spec(*names))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout)

    layout = jax.tree.map(lambda x: array(x.shape, x.dtype), layout)
    state = jax.eval_shape(
        functools.partial(
            empty, decoder.config, slots=slots, ring=ring, kept=kept, pieces=len(decoder.stacks)
        ),
        layout,
    )
    heads = jax.eval_shape(lambda: Heads.of(decoder, vocabulary))
    prompts = [
        Padded(
            array((rows, length), jnp.int32, "batch", "length"),
            array((rows, length), jnp.int32, "batch", "length"),
            array((rows,), jnp.int32, "batch"),
            array((rows,), jnp.int32, "batch"),
        )
        for length in slots
    ]
    return (
        state,
        lambda: begin.lower(decoder, state, array((rows,), jnp.int32), prompts, layout),
        lambda: advance.lower(
            decoder, heads, state, array((rows,), jnp.bool_), array((), jnp.int32),
            vocabulary=vocabulary, text_tokens=None,
        ),
    )  # fmt: skip


def put(tree: Any) -> Any:
    """Small arrays on every device of the mesh."""
    mesh = jax.sharding.get_mesh()
    return jax.tree.map(lambda x: jax.device_put(x, jax.NamedSharding(mesh, jax.P())), tree)


def whole_rows(rows: int) -> int:
    """`rows` rounded up so that the batch splits evenly over the mesh."""
    shape = jax.sharding.get_mesh().shape
    shards = shape.get("data", 1) * shape.get("fsdp", 1)
    return -(-rows // shards) * shards
