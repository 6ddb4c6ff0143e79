"""Scaled dot-product attention: a reference, and fast implementations for each platform.

`attention` chooses by platform: splash attention on TPUs (a Pallas kernel that does not store the
scores and skips the blocks above the diagonal), cuDNN's flash attention on GPUs, and blocks of
queries in plain XLA elsewhere. All have the same signature. The tests compare each of them with
`xla`, the reference.

Sharding (explicit mode): outputs have the sharding of the queries. Keys and values are gathered
over the axis that splits the queries' length, so a split context is correct without a ring.

There may be fewer heads of keys and values than of queries (grouped queries, arXiv 2305.13245):
query head h uses head h // (heads / kv_heads) of keys and values.

Axes: b batch, t query length, s key length, h heads, k head_dim, r query heads of a key head.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Num

from leon_jax.ops import products

# The score of a masked key. It is finite, so that a row without visible keys gives no NaN.
_MASKED = -1e30
# Sizes of the blocks of splash attention. It uses the largest that divides the length of a row.
BLOCKS = (512, 256, 128)
# Queries of a block of `blocked`.
_BLOCK_QUERIES = 256

# The name of the values that a remat policy may save: the result (and the log sums of splash).
SAVED = "attention"

Implementation = Literal["auto", "xla", "blocked", "splash", "cudnn"]


def attention(
    q: Float[Array, "batch length heads head_dim"],
    k: Float[Array, "batch length kv_heads head_dim"],
    v: Float[Array, "batch length kv_heads head_dim"],
    *,
    segment_ids: Int[Array, "batch length"] | None = None,
    causal: bool = True,
    implementation: Implementation = "auto",
    operands: DTypeLike | None = None,
) -> Float[Array, "batch length heads head_dim"]:
    """Computes softmax(q k^T / sqrt(head_dim)) v, with the softmax in float32.

    Args:
      q, k, v: queries, keys and values of any floating dtype. `heads` is a multiple of `kv_heads`.
        The output has the dtype of `v`.
      segment_ids: segment of each position, which attends only to positions of its segment; None:
        one segment.
      causal: position i attends only to positions 0..i.
      implementation: the implementation; "auto": see `choose`.
      operands: dtype of the operands of the products in `blocked` (see `leon_jax.ops.products`);
        None: that of `q`. The other implementations do not use it.

    For example, causal with segment ids [1, 1, 2, 2], a query (row) attends to the keys (columns)

        1 . . .
        1 1 . .
        . . 1 .
        . . 1 1
    """
    if implementation == "auto":
        implementation = choose(q, operands)
    run: dict[str, Callable[..., Array]] = {
        "xla": xla,
        "blocked": functools.partial(blocked, operands=operands),
        "splash": splash,
        "cudnn": cudnn,
    }
    attended = run[implementation](q, k, v, segment_ids=segment_ids, causal=causal)
    # Splash names its saved values itself. A second name here would save the result twice.
    return attended if implementation == "splash" else checkpoint_name(attended, SAVED)


def choose(
    q: Float[Array, "batch length heads head_dim"], operands: DTypeLike | None = None
) -> Implementation:
    """Returns the fastest implementation on the devices of the current mesh.

    Args:
      q, operands: see `attention`.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = "" if device is None else device.device_kind.lower()
    parts, (_, length, _, head_dim) = _count(_spec(q)[1]), q.shape
    if "tpu" in kind and length // parts % BLOCKS[-1] == 0:
        return "splash"
    if parts > 1:
        return "xla"
    # The limits of cuDNN's kernels.
    fits = q.dtype in (jnp.bfloat16, jnp.float16) and length % 2 == 0
    if "nvidia" in kind and fits and head_dim % 8 == 0 and head_dim <= 128:
        return "cudnn"
    is_rounded = operands is not None and jnp.dtype(operands) != q.dtype
    return "blocked" if length > _BLOCK_QUERIES or is_rounded else "xla"


def xla(
    q: Float[Array, "batch length heads head_dim"],
    k: Float[Array, "batch length kv_heads head_dim"],
    v: Float[Array, "batch length kv_heads head_dim"],
    *,
    segment_ids: Int[Array, "batch length"] | None = None,
    causal: bool = True,
) -> Float[Array, "batch length heads head_dim"]:
    """Computes `attention` by its formula, with all scores in memory: the reference."""
    batch, length, heads, _ = _spec(q)
    k, v = (_repeat(jax.reshard(x, jax.P(batch, None, heads, None)), q.shape[2]) for x in (k, v))
    logits = jnp.einsum(
        "bthk,bshk->bhts",
        q * q.shape[-1] ** -0.5,
        k,
        preferred_element_type=jnp.float32,
        out_sharding=jax.P(batch, heads, length, None),
    )
    if causal:
        visible = jnp.tril(jnp.ones((q.shape[1], k.shape[1]), bool))
        logits = jnp.where(visible, logits, _MASKED)
    if segment_ids is not None:
        rows = jax.reshard(segment_ids, jax.P(batch, length))
        columns = jax.reshard(segment_ids, jax.P(batch, None))
        same = rows[:, None, :, None] == columns[:, None, None, :]
        logits = jnp.where(same, logits, _MASKED)
    probabilities = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    sharding = jax.P(batch, length, heads, None)
    return jnp.einsum("bhts,bshk->bthk", probabilities, v, out_sharding=sharding)


def blocked(
    q: Float[Array, "batch length heads head_dim"],
    k: Float[Array, "batch length kv_heads head_dim"],
    v: Float[Array, "batch length kv_heads head_dim"],
    *,
    segment_ids: Int[Array, "batch length"] | None = None,
    causal: bool = True,
    operands: DTypeLike | None = None,
) -> Float[Array, "batch length heads head_dim"]:
    """Computes `attention` in blocks of queries.

    If causal, a block of queries uses only the keys up to its end, so the scores above the diagonal
    blocks are never computed. The scores are not saved: the backward pass computes those of one
    block at a time again.

    Raises:
      ValueError: the length is split over devices.
    """
    batch, length, heads, _ = _spec(q)
    if _count(length) > 1:
        raise ValueError("attention in blocks cannot split the length over devices; use xla")
    size = q.shape[1]
    segment_ids = jnp.zeros(q.shape[:2], jnp.int32) if segment_ids is None else segment_ids
    layout, rows = jax.P(batch, length, heads, None), jax.P(batch, length)

    @functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=0)
    def attend(start, q, k, v, query_segments, key_segments):
        # The queries of all heads that share a key head are rows of one product.
        queries = q.reshape(*k.shape[:2], -1, k.shape[3])
        scores = products.einsum("bhtk,bhsk->bhts", queries, k, operands, out_dtype=jnp.float32)
        visible = query_segments[:, None, :, None] == key_segments[:, None, None, :]
        if causal:
            visible &= start + jnp.arange(q.shape[2])[:, None] >= jnp.arange(k.shape[2])
        visible = jnp.tile(visible, (1, 1, q.shape[1] // k.shape[1], 1))
        probabilities = jax.nn.softmax(jnp.where(visible, scores, _MASKED), axis=-1)
        attended = products.einsum("bhts,bhsk->bhtk", probabilities.astype(v.dtype), v, operands)
        return attended.reshape(q.shape)

    def local(q, k, v, segment_ids):
        q, k, v = (products.transpose(x, "bthk", "bhtk") for x in (q * q.shape[-1] ** -0.5, k, v))
        blocks = []
        for start in range(0, size, _BLOCK_QUERIES):
            stop = min(start + _BLOCK_QUERIES, size)
            keys = stop if causal else size
            blocks.append(
                attend(
                    start,
                    q[:, :, start:stop],
                    k[:, :, :keys],
                    v[:, :, :keys],
                    segment_ids[:, start:stop],
                    segment_ids[:, :keys],
                )
            )
        return products.transpose(jnp.concatenate(blocks, axis=2), "bhtk", "bthk")

    return jax.shard_map(local, in_specs=(layout, layout, layout, rows), out_specs=layout)(
        q, jax.reshard(k, layout), jax.reshard(v, layout), jax.reshard(segment_ids, rows)
    )


def splash(
    q: Float[Array, "batch length heads head_dim"],
    k: Float[Array, "batch length kv_heads head_dim"],
    v: Float[Array, "batch length kv_heads head_dim"],
    *,
    segment_ids: Int[Array, "batch length"] | None = None,
    causal: bool = True,
    interpret: bool = False,
) -> Float[Array, "batch length heads head_dim"]:
    """Computes `attention` with JAX's splash attention kernel for TPUs.

    Args:
      q, k, v, segment_ids, causal: see `attention`.
      interpret: interpret the kernel, which is slow but works on any platform, for tests.

    Raises:
      ValueError: the length on a device is not a multiple of 128.
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

    def local(kernel, q, k, v, query_segments, key_segments):
        return jax.vmap(kernel)(q, k, v, kernels.SegmentIds(query_segments, key_segments))

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
    k: Float[Array, "batch length kv_heads head_dim"],
    v: Float[Array, "batch length kv_heads head_dim"],
    *,
    segment_ids: Int[Array, "batch length"] | None = None,
    causal: bool = True,
) -> Float[Array, "batch length heads head_dim"]:
    """Computes `attention` with cuDNN's flash attention, for bfloat16 and float16 on NVIDIA GPUs.

    With segments, it uses a mask, [batch, 1, length, length].

    Raises:
      ValueError: the length is split over devices.
    """
    batch, length, heads, _ = _spec(q)
    if _count(length) > 1:
        raise ValueError("cuDNN attention cannot split the length over devices; use xla")
    layout = jax.P(batch, length, heads, None)

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
        local, in_specs=(layout, layout, layout, rows), out_specs=layout, check_vma=False
    )(q, jax.reshard(k, layout), jax.reshard(v, layout), segment_ids)


class CachedArray(NamedTuple):
    """Keys or values in a cache.

    Attributes:
      values: [..., slots, head_dim], of any floating dtype, or int8 (see `leon_jax.ops.int8`).
      scale: float32[..., slots] for int8; otherwise None.
    """

    values: Num[Array, "..."]
    scale: Float[Array, "..."] | None = None


class LayerCache(NamedTuple):
    """The cached keys and values of one layer. The axis of heads is before the axis of slots.

    Attributes:
      keys, values: `CachedArray`, [group, *sample, kv_heads, slots, head_dim]. Where `valid` is
        False, the contents are ignored (but must be finite).
      valid: bool[group, *sample, slots].
    """

    keys: Any
    values: Any
    valid: Bool[Array, "..."]


def cached_attention(
    q: Float[Array, "group sample heads head_dim"],
    k: Float[Array, "group sample kv_heads head_dim"],
    v: Float[Array, "group sample kv_heads head_dim"],
    prompt: LayerCache,
    output: LayerCache,
) -> Float[Array, "group sample heads head_dim"]:
    """Computes the attention of one new token of each sample to the cache and to itself.

    The samples of a group share a prompt, which is read once for all of them. The cache is only
    read. The softmax over the prompt, the output and the new token uses one maximum and one sum, so
    it equals the softmax of the concatenation.

    Args:
      q, k, v: query, key and value of the new token, which always attends to itself.
      prompt: cache of the group's prompt, [group, kv_heads, slots, head_dim].
      output: cache of the sample's generated tokens, [group, sample, kv_heads, slots, head_dim].
    """
    group, sample, heads, _ = _spec(q)
    shape, is_shared = q.shape, q.shape[2] != k.shape[2]
    # Axes of the query heads, which come before those of slots or dimensions.
    h, sharding = ("hr" if is_shared else "h"), jax.P(group, sample, heads, None)
    q = jnp.asarray(q) * q.shape[-1] ** -0.5
    if is_shared:
        sharding = jax.P(group, sample, heads, None, None)
        q = q.reshape(*k.shape[:3], -1, k.shape[3], out_sharding=sharding)
    subscripts = (
        (f"gn{h}k,ghsk->gn{h}s", f"gn{h}s,ghsk->gn{h}k"),
        (f"gn{h}k,gnhsk->gn{h}s", f"gn{h}s,gnhsk->gn{h}k"),
    )
    # The prompt's arrays have no axis of samples, so it is added.
    parts = (prompt, lambda array: array[:, None]), (output, lambda array: array)

    def by_query(array: Array) -> Array:
        """Adds the axis of the query heads that share a key head to [group, sample, heads, ...]."""
        return array[:, :, :, None] if is_shared else array

    def cache_scores(product: str, cache: LayerCache, expand: Callable[[Array], Array]) -> Array:
        scores = jnp.einsum(
            product,
            q,
            cache.keys.values.astype(q.dtype),
            preferred_element_type=jnp.float32,
            out_sharding=sharding,
        )
        if cache.keys.scale is not None:
            scores *= by_query(expand(cache.keys.scale))
        return jnp.where(by_query(expand(cache.valid)[:, :, None]), scores, _MASKED)

    scores = [
        cache_scores(product, *part) for (product, _), part in zip(subscripts, parts, strict=True)
    ]
    self_score = jnp.sum(q.astype(jnp.float32) * by_query(k).astype(jnp.float32), axis=-1)
    top = functools.reduce(jnp.maximum, [part.max(axis=-1) for part in scores], self_score)
    weights = [jnp.exp(part - top[..., None]) for part in scores]
    self_weight = jnp.exp(self_score - top)
    total = sum((part.sum(axis=-1) for part in weights), self_weight)
    result = (self_weight / total)[..., None].astype(v.dtype) * by_query(v)
    for (_, product), (cache, expand), weight in zip(subscripts, parts, weights, strict=True):
        probabilities = weight / total[..., None]
        if cache.values.scale is not None:
            probabilities *= by_query(expand(cache.values.scale))
        values = cache.values.values.astype(v.dtype)
        result += jnp.einsum(product, probabilities.astype(v.dtype), values, out_sharding=sharding)
    return result.reshape(shape, out_sharding=jax.P(group, sample, heads, None))


def _repeat(
    x: Float[Array, "batch length kv_heads head_dim"], heads: int
) -> Float[Array, "batch length heads head_dim"]:
    """Repeats each head of keys or values for all query heads that use it."""
    batch, length, kv_heads, head_dim = x.shape
    if kv_heads == heads:
        return x
    shape = (batch, length, kv_heads, heads // kv_heads, head_dim)
    repeated = jnp.broadcast_to(x[:, :, :, None], shape)
    return repeated.reshape(batch, length, heads, head_dim, out_sharding=_spec(x))


def _count(entry: str | tuple[str, ...] | None) -> int:
    """Returns the number of parts of an axis with this entry in its PartitionSpec."""
    shape = jax.sharding.get_abstract_mesh().shape
    names = () if entry is None else (entry,) if isinstance(entry, str) else entry
    return math.prod(shape[name] for name in names)


def _spec(x: Array) -> jax.P:
    """Returns the PartitionSpec of `x`, with one entry for each axis."""
    return jax.typeof(x).sharding.spec
