"""Scaled dot-product attention: one signature, an oracle, and what is fast on each platform.

`attention` picks by platform: splash attention on TPU (a Pallas kernel that never holds the scores
and skips what lies above the diagonal), cuDNN's flash attention on GPU, blocks of queries in plain
XLA elsewhere. The tests compare each with `xla`, which is meant to be obviously right.

Sharding (explicit mode): outputs are laid out like the queries. The axis the queries' length is
split over is gathered for keys and values, so splitting the context is correct without a ring.

Axes: b batch, t query length, s key length, h heads, k head_dim.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, Num

# Finite, so that a row without a single visible key gives a uniform mixture and not NaN.
_HIDDEN = -1e30
# Splash attention works on blocks of queries and keys; the largest that divides a row is taken.
BLOCKS = (512, 256, 128)
# Queries of a block in plain XLA.
_QUERIES = 256

# What a rematerialisation policy may keep of attention: its result (and splash's log sums).
SAVED = "attention"

Implementation = Literal["auto", "xla", "blocked", "splash", "cudnn"]


def attention(
    q: Float[Array, "batch length heads head_dim"],
    k: Float[Array, "batch length heads head_dim"],
    v: Float[Array, "batch length heads head_dim"],
    *,
    segment_ids: Int[Array, "batch length"] | None = None,
    causal: bool = True,
    implementation: Implementation = "auto",
) -> Float[Array, "batch length heads head_dim"]:
    """softmax(q k^T / sqrt(head_dim)) v, with the softmax in float32.

    Args:
      q, k, v: queries, keys and values, any floating dtype (the output has the dtype of `v`).
      segment_ids: a position sees only positions of its own segment; None: one segment.
      causal: position i sees positions 0..i only.
      implementation: which one computes it; "auto" is `choose`.

    For example, causal with segment ids [1, 1, 2, 2] lets query (row) see key (column)

        1 . . .
        1 1 . .
        . . 1 .
        . . 1 1
    """
    if implementation == "auto":
        implementation = choose(q)
    run = {"xla": xla, "blocked": blocked, "splash": splash, "cudnn": cudnn}[implementation]
    attended = run(q, k, v, segment_ids=segment_ids, causal=causal)
    # Splash names what its backward pass reads; a second name here would keep it twice.
    return attended if implementation == "splash" else checkpoint_name(attended, SAVED)


def choose(q: Float[Array, "batch length heads head_dim"]) -> Implementation:
    """The fastest implementation for these queries on the devices of the mesh that is set."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = "" if device is None else device.device_kind.lower()
    parts, (_, length, _, head_dim) = _count(_spec(q)[1]), q.shape
    if "tpu" in kind and length // parts % BLOCKS[-1] == 0:
        return "splash"
    if parts > 1:
        return "xla"
    # What cuDNN's kernels take.
    fits = q.dtype in (jnp.bfloat16, jnp.float16) and length % 2 == 0
    if "nvidia" in kind and fits and head_dim % 8 == 0 and head_dim <= 128:
        return "cudnn"
    return "xla" if length <= _QUERIES else "blocked"


def xla(
    q: Float[Array, "batch length heads head_dim"],
    k: Float[Array, "batch length heads head_dim"],
    v: Float[Array, "batch length heads head_dim"],
    *,
    segment_ids: Int[Array, "batch length"] | None = None,
    causal: bool = True,
) -> Float[Array, "batch length heads head_dim"]:
    """`attention` as its formula, with all scores in memory: the oracle."""
    batch, length, heads, _ = _spec(q)
    k, v = (jax.reshard(x, jax.P(batch, None, heads, None)) for x in (k, v))
    logits = jnp.einsum(
        "bthk,bshk->bhts",
        q * q.shape[-1] ** -0.5,
        k,
        preferred_element_type=jnp.float32,
        out_sharding=jax.P(batch, heads, length, None),
    )
    if causal:
        visible = jnp.tril(jnp.ones((q.shape[1], k.shape[1]), bool))
        logits = jnp.where(visible, logits, _HIDDEN)
    if segment_ids is not None:
        rows = jax.reshard(segment_ids, jax.P(batch, length))
        columns = jax.reshard(segment_ids, jax.P(batch, None))
        same = rows[:, None, :, None] == columns[:, None, None, :]
        logits = jnp.where(same, logits, _HIDDEN)
    mixture = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bhts,bshk->bthk", mixture, v, out_sharding=jax.P(batch, length, heads, None))


def blocked(
    q: Float[Array, "batch length heads head_dim"],
    k: Float[Array, "batch length heads head_dim"],
    v: Float[Array, "batch length heads head_dim"],
    *,
    segment_ids: Int[Array, "batch length"] | None = None,
    causal: bool = True,
) -> Float[Array, "batch length heads head_dim"]:
    """`attention` in blocks of queries, each beside the keys up to its own end if causal.

    What lies above the diagonal blocks is never computed, and no scores are kept: the backward pass
    computes those of one block at a time again. The length must not be split over devices.
    """
    batch, length, heads, _ = _spec(q)
    if _count(length) > 1:
        raise ValueError("attention in blocks cannot split the length over devices; use xla")
    size = q.shape[1]
    segment_ids = jnp.zeros(q.shape[:2], jnp.int32) if segment_ids is None else segment_ids
    whole, rows = jax.P(batch, length, heads, None), jax.P(batch, length)

    @functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=0)
    def one(start, q, k, v, own, others):
        scores = jnp.einsum("bhtk,bhsk->bhts", q, k, preferred_element_type=jnp.float32)
        visible = own[:, None, :, None] == others[:, None, None, :]
        if causal:
            visible &= start + jnp.arange(q.shape[2])[:, None] >= jnp.arange(k.shape[2])
        mixture = jax.nn.softmax(jnp.where(visible, scores, _HIDDEN), axis=-1)
        return jnp.einsum("bhts,bhsk->bhtk", mixture.astype(v.dtype), v)

    def local(q, k, v, segment_ids):
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
        done = []
        for start in range(0, size, _QUERIES):
            stop = min(start + _QUERIES, size)
            seen = stop if causal else size
            done.append(
                one(
                    start,
                    q[:, :, start:stop],
                    k[:, :, :seen],
                    v[:, :, :seen],
                    segment_ids[:, start:stop],
                    segment_ids[:, :seen],
                )
            )
        return jnp.swapaxes(jnp.concatenate(done, axis=2), 1, 2)

    return jax.shard_map(local, in_specs=(whole, whole, whole, rows), out_specs=whole)(
        q, jax.reshard(k, whole), jax.reshard(v, whole), jax.reshard(segment_ids, rows)
    )


def splash(
    q: Float[Array, "batch length heads head_dim"],
    k: Float[Array, "batch length heads head_dim"],
    v: Float[Array, "batch length heads head_dim"],
    *,
    segment_ids: Int[Array, "batch length"] | None = None,
    causal: bool = True,
    interpret: bool = False,
) -> Float[Array, "batch length heads head_dim"]:
    """`attention` by JAX's splash attention kernel for TPU.

    Args:
      q, k, v, segment_ids, causal: see `attention`. A device's part of the length must be a
        multiple of 128.
      interpret: run the kernel's program on any platform, slowly, for tests.
    """
    # Loading Pallas takes a third of a second, which only TPUs need.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    batch, length, heads, _ = _spec(q)
    size = q.shape[1]
    block = next((b for b in BLOCKS if (size // _count(length)) % b == 0), None)
    if block is None:
        raise ValueError(f"splash attention needs a multiple of {BLOCKS[-1]} tokens, not {size}")
    mask = masks.CausalMask((size, size)) if causal else masks.FullMask((size, size))
    sizes = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        use_fused_bwd_kernel=True,
    )
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * q.shape[2]),
        block_sizes=sizes,
        head_shards=_count(heads),
        q_seq_shards=_count(length),
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )
    mesh = jax.sharding.get_abstract_mesh()
    layout = kernel.manual_sharding_spec(jax.NamedSharding(mesh, jax.P(heads, length)))
    kernel = jax.tree.map(jax.reshard, kernel, layout)
    queries, keys = jax.P(batch, heads, length, None), jax.P(batch, heads, None, None)
    if segment_ids is None:
        segment_ids = jnp.zeros(q.shape[:2], jnp.int32)
    rows, columns = jax.P(batch, length), jax.P(batch, None)

    def local(kernel, q, k, v, own, others):
        return jax.vmap(kernel)(q, k, v, kernels.SegmentIds(own, others))

    attended = jax.shard_map(
        local,
        in_specs=(layout, queries, keys, keys, rows, columns),
        out_specs=queries,
        check_vma=False,
    )(
        kernel,
        jnp.swapaxes(q * q.shape[-1] ** -0.5, 1, 2),
        jax.reshard(jnp.swapaxes(k, 1, 2), keys),
        jax.reshard(jnp.swapaxes(v, 1, 2), keys),
        jax.reshard(segment_ids, rows),
        jax.reshard(segment_ids, columns),
    )
    return jnp.swapaxes(attended, 1, 2).astype(v.dtype)


def cudnn(
    q: Float[Array, "batch length heads head_dim"],
    k: Float[Array, "batch length heads head_dim"],
    v: Float[Array, "batch length heads head_dim"],
    *,
    segment_ids: Int[Array, "batch length"] | None = None,
    causal: bool = True,
) -> Float[Array, "batch length heads head_dim"]:
    """`attention` by cuDNN's flash attention, for bfloat16 and float16 on NVIDIA GPUs.

    Segments are a mask beside the scores, [batch, 1, length, length] in the inputs' dtype.
    """
    batch, length, heads, _ = _spec(q)
    if _count(length) > 1:
        raise ValueError("cuDNN attention cannot split the length over devices; use xla")
    whole = jax.P(batch, length, heads, None)

    def local(q, k, v, segment_ids):
        mask = None
        if segment_ids is not None:
            mask = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
        return jax.nn.dot_product_attention(
            q, k, v, mask=mask, is_causal=causal, implementation="cudnn"
        )

    rows = None if segment_ids is None else jax.P(batch, length)
    segment_ids = None if segment_ids is None else jax.reshard(segment_ids, rows)
    return jax.shard_map(
        local, in_specs=(whole, whole, whole, rows), out_specs=whole, check_vma=False
    )(q, jax.reshard(k, whole), jax.reshard(v, whole), segment_ids)


class CachedArray(NamedTuple):
    """Keys or values as a cache keeps them.

    Attributes:
      values: [..., slots, head_dim], of any floating dtype, or int8 (see `leon_jax.ops.int8`).
      scale: float32[..., slots] of int8, else None.
    """

    values: Num[Array, "..."]
    scale: Float[Array, "..."] | None = None


class LayerCache(NamedTuple):
    """Keys and values of what a token sees, for one layer; heads stand before slots.

    Attributes:
      keys, values: `CachedArray`, [group, *sample, heads, slots, head_dim]; where `valid` is False
        their content does not matter (but is finite).
      valid: bool[group, *sample, slots].
    """

    keys: Any
    values: Any
    valid: Bool[Array, "..."]


def cached_attention(
    q: Float[Array, "group sample heads head_dim"],
    k: Float[Array, "group sample heads head_dim"],
    v: Float[Array, "group sample heads head_dim"],
    prompt: LayerCache,
    answer: LayerCache,
) -> Float[Array, "group sample heads head_dim"]:
    """Attention of one new token a sample over a read-only cache and over itself.

    The samples of a group share a prompt, which is read once for all of them. The softmax is taken
    over the three parts without ever writing the new key and value into the cache: they share one
    maximum and one sum, which is the softmax of the concatenation.

    Args:
      q, k, v: query, key and value of the new token. It always sees itself.
      prompt: of the group, [group, heads, slots, head_dim].
      answer: of the sample, [group, sample, heads, slots, head_dim].
    """
    group, sample, heads, _ = _spec(q)
    scored, mixed = jax.P(group, sample, heads, None), jax.P(group, sample, heads, None)
    q = q * q.shape[-1] ** -0.5
    letters = ("gnhk,ghsk->gnhs", "gnhs,ghsk->gnhk"), ("gnhk,gnhsk->gnhs", "gnhs,gnhsk->gnhk")
    # The prompt's arrays have no axis of samples.
    parts = (prompt, lambda array: array[:, None]), (answer, lambda array: array)

    def score(subscripts: str, past: LayerCache, wide: Callable[[Array], Array]) -> Array:
        found = jnp.einsum(
            subscripts,
            q,
            past.keys.values.astype(q.dtype),
            preferred_element_type=jnp.float32,
            out_sharding=scored,
        )
        if past.keys.scale is not None:
            found *= wide(past.keys.scale)
        return jnp.where(wide(past.valid)[:, :, None], found, _HIDDEN)

    scores = [score(how, *part) for (how, _), part in zip(letters, parts, strict=True)]
    own = jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32), axis=-1)
    top = functools.reduce(jnp.maximum, [part.max(axis=-1) for part in scores], own)
    weights, own = [jnp.exp(part - top[..., None]) for part in scores], jnp.exp(own - top)
    total = sum((part.sum(axis=-1) for part in weights), own)
    result = (own / total)[..., None].astype(v.dtype) * v
    for (_, mix), (past, wide), weight in zip(letters, parts, weights, strict=True):
        share = weight / total[..., None]
        if past.values.scale is not None:
            share *= wide(past.values.scale)
        values = past.values.values.astype(v.dtype)
        result += jnp.einsum(mix, share.astype(v.dtype), values, out_sharding=mixed)
    return result


def _count(entry: str | tuple[str, ...] | None) -> int:
    """Into how many parts an axis is split that is laid out like this."""
    shape = jax.sharding.get_abstract_mesh().shape
    names = () if entry is None else (entry,) if isinstance(entry, str) else entry
    return math.prod(shape[name] for name in names)


def _spec(x: Array) -> jax.P:
    """How `x` is split; one entry an axis."""
    return jax.typeof(x).sharding.spec
