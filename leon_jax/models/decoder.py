"""The CM3Leon decoder: an OPT-shaped transformer over one stream of text and image tokens.

What the paper (Yu et al. 2023, arXiv 2309.02591, section 2.3) fixes: no biases, no dropout, layer
norms without parameters, learned absolute positions, truncated-normal initialisation (sd 0.006, cut
at 3 sd; positions sd 0.0002) and zero-initialised residual output projections, so that at step 0
every block is the identity. Inferred from the code base it was trained with (metaseq): pre-norm
with a final norm, eps 1e-5, ReLU in an MLP of 4 x embed, tied input and output embeddings, no
embedding scale. The position table has `max_length` rows: the original's two extra rows (padding
and an offset) hold nothing that is ever read here.

Layers are stacked (every block weight has a leading `layers` axis) and scanned. Master weights are
float32; `DecoderConfig.dtype` is what activations and matmul operands are cast to.

Axes: b batch, t length, d embed, h heads, k head_dim, f mlp, v vocab. In an einsum the leading
`...` is `bt` for whole sequences; for one decoding step it is (streams, groups, samples).
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from leon_jax.config import UserError
from leon_jax.ops import int8
from leon_jax.ops.attention import SAVED, Implementation, LayerCache, attention, cached_attention
from leon_jax.sharding import RULES, spec

# What weights are kept in for inference; see `Decoder.stored_as`.
WeightType = Literal["float32", "bfloat16", "int8"]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder.

    Attributes:
      vocab_size: rows of the tied embedding table; `leon_jax.vocabulary.Vocabulary.size`.
      max_length: longest sequence; rows of the learned position table.
      layers, embed, heads, mlp: depth, model width, attention heads, hidden width of the MLP.
      dtype: compute dtype; weights are kept in float32.
      remat: what the backward pass recomputes inside a layer: nothing ("none"), everything but
        the products with weights ("dots"), everything but the attention's result ("attention"),
        or everything ("full").
      attention: which implementation (see `leon_jax.ops.attention`); "auto" picks by platform.
      init_std, position_std: sd that weights and positions start with; weights are truncated
        normals.
      position_init: how positions start: as truncated normals ("normal", the paper) or as
        sinusoids with wavelengths from 2 pi to 2 pi `max_length` (Vaswani et al. 2017, section
        3.5, with `max_length` for 10,000). They are learned from there either way; from
        sinusoids, "one row up" in a picture is a rotation at once and need not be found first,
        which saves a small model much of its training.
      pad_id: the embedding row that starts as zeros.
      part_step: every part of a document starts at a multiple of this many positions (see
        `leon_jax.vocabulary.Vocabulary.positions`); 1, as in the paper: positions have no gaps.
        A small model then finds "the same place in the retrieved picture" with one attention
        head; otherwise it has to subtract two positions that vary with the captions' lengths.
    """

    vocab_size: int
    max_length: int
    layers: int
    embed: int
    heads: int
    mlp: int
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "attention", "full"] = "none"
    attention: Implementation = "auto"
    init_std: float = 0.006
    position_std: float = 0.0002
    position_init: Literal["normal", "sinusoids"] = "normal"
    pad_id: int = 1
    part_step: int = 1

    def __post_init__(self):
        for name in ("vocab_size", "max_length", "layers", "embed", "heads", "mlp", "part_step"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.embed % self.heads:
            raise UserError(f"embed {self.embed} must be a multiple of heads {self.heads}")
        if self.position_init == "sinusoids" and self.embed % 2:
            raise UserError(f"embed is {self.embed}; sinusoids come in pairs, so make it even")

    @property
    def head_dim(self) -> int:
        return self.embed // self.heads

    def parameter_count(self) -> int:
        """Number of weights: blocks, the tied table and the positions (norms have none)."""
        block = 4 * self.embed**2 + 2 * self.embed * self.mlp
        return self.layers * block + (self.vocab_size + self.max_length) * self.embed

    def flops_per_token(self, length: int) -> int:
        """Floating-point operations of one training step, a token of a row of `length` tokens.

        Forward and backward (three times the forward pass), matmuls only, the tied table once (as
        output head), causal attention at half its square, recomputation not counted.
        """
        weights = self.layers * (4 * self.embed**2 + 2 * self.embed * self.mlp)
        weights += self.vocab_size * self.embed
        return 6 * weights + 6 * self.layers * length * self.embed


class Block(nnx.Module):
    """All layers' weights, stacked; inside the layer scan the same methods see one layer's."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        layers, embed, mlp = config.layers, config.embed, config.mlp
        heads, head_dim = config.heads, config.head_dim
        normal = _truncated_normal(config.init_std)
        # Zeros make every residual branch vanish at step 0; a small normal would do it only nearly.
        zeros = nnx.initializers.zeros_init()

        def weight(init, shape, *names):
            sharding = spec("layers", *names)
            return nnx.Param(init(rngs.params(), (layers, *shape), jnp.float32, sharding))

        projection = (embed, heads, head_dim)
        names = ("weight_embed", "heads", "head_dim")
        self.query = weight(normal, projection, *names)
        self.key = weight(normal, projection, *names)
        self.value = weight(normal, projection, *names)
        self.out = weight(zeros, (heads, head_dim, embed), "heads", "head_dim", "weight_embed")
        self.fc1 = weight(normal, (embed, mlp), "weight_embed", "mlp")
        self.fc2 = weight(zeros, (mlp, embed), "mlp", "weight_embed")

    def project(self, x: Float[Array, "*lead embed"]):
        """(query, key, value) of the normed input, each [*lead, heads, head_dim]."""
        x = _norm(x)
        sharding = jax.P(*_lead(x), *spec("heads", "head_dim"))
        return tuple(
            _product("...d,dhk->...hk", x, weight, sharding)
            for weight in (self.query, self.key, self.value)
        )

    def finish(
        self, x: Float[Array, "*lead embed"], attended: Float[Array, "*lead heads head_dim"]
    ) -> Float[Array, "*lead embed"]:
        """Adds the attention branch's output, then the MLP branch."""
        narrow, wide = jax.P(*_lead(x), None), jax.P(*_lead(x), *spec("mlp"))
        x = x + _product("...hk,hkd->...d", attended, self.out, narrow)
        hidden = jax.nn.relu(_product("...d,df->...f", _norm(x), self.fc1, wide))
        return x + _product("...f,fd->...d", hidden, self.fc2, narrow)


class Int8Weight(nnx.Module):
    """A stacked weight of `Block` in 8 bits, with a scale for each layer and output channel."""

    def __init__(self, weight: Float[Array, "layers ..."], summed: tuple[int, ...]):
        values, scale = int8.quantize(weight, summed)
        self.values, self.scale = nnx.Param(values), nnx.Param(scale)


class Decoder(nnx.Module):
    """The model. Creation also works inside `jax.jit` (sharded from birth) and `jax.eval_shape`."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        table = _truncated_normal(config.init_std)(
            rngs.params(),
            (config.vocab_size, config.embed),
            jnp.float32,
            spec("vocab", "weight_embed"),
        )
        keep = jnp.arange(config.vocab_size)[:, None] != config.pad_id
        self.table = nnx.Param(table * keep)
        start = _sinusoids if config.position_init == "sinusoids" else _truncated_normal
        self.positions = nnx.Param(
            start(config.position_std)(
                rngs.params(),
                (config.max_length, config.embed),
                jnp.float32,
                spec(None, "weight_embed"),
            )
        )
        self.blocks: Block | nnx.List = Block(config, rngs=rngs)

    @property
    def stacks(self) -> list[Block]:
        """The layers in order: stacked in one block, or, after `split`, in a block each."""
        return [self.blocks] if isinstance(self.blocks, Block) else list(self.blocks)

    @property
    def stored(self) -> str:
        """What the weights are kept in, as `stored_as` calls it."""
        small = isinstance(self.stacks[0].query, Int8Weight)
        return "int8" if small else str(self.table.dtype)

    def split(self) -> Self:
        """The same model for inference alone, with every layer's weights in arrays of their own.

        A scan over stacked layers copies each layer's weights and cache out of the stack before it
        reads them (XLA on CPUs), which takes longer than decoding a token from them.
        """
        other = nnx.clone(self)
        layers = range(self.config.layers)
        other.blocks = nnx.List(
            [jax.tree.map(lambda x, at=layer: x[at : at + 1], self.blocks) for layer in layers]
        )
        return other

    def stored_as(self, dtype: WeightType) -> Self:
        """The same model for inference alone, with weights kept in another type.

        `int8` keeps the blocks' weights in 8 bits, one scale for each output channel, and the
        tables in the compute dtype. What is computed in stays `config.dtype`.
        """
        other = nnx.clone(self)
        kept = self.config.dtype if dtype == "int8" else dtype
        for name in ("table", "positions"):
            weight = getattr(other, name)
            setattr(other, name, nnx.Param(weight[...].astype(kept)))
        # The axes that a product sums over; the first is that of the layers.
        summed = {
            "query": (1,),
            "key": (1,),
            "value": (1,),
            "out": (1, 2),
            "fc1": (1,),
            "fc2": (1,),
        }
        for piece in other.stacks:
            for name, axes in summed.items():
                weight = getattr(piece, name)[...]
                small = Int8Weight(weight, axes) if dtype == "int8" else None
                setattr(piece, name, small or nnx.Param(weight.astype(kept)))
        return other

    def __call__(
        self,
        ids: Int[Array, "batch length"],
        positions: Int[Array, "batch length"] | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
    ) -> Float[Array, "batch length embed"]:
        """Hidden states after the final norm; `logits` turns them into scores.

        Args:
          ids: tokens, 0..vocab_size - 1.
          positions: rows of the position table; None: 0, 1, 2, ... in every row.
          segment_ids: packed documents see only themselves; None: one document a row.

        Raises:
          ValueError: rows longer than `max_length` without explicit positions.
        """

        def layer(x, block):
            q, k, v = block.project(x)
            attended = attention(
                q, k, v, segment_ids=segment_ids, implementation=self.config.attention
            )
            return block.finish(x, attended), None

        x = self._embed(ids, positions)
        for piece in self.stacks:
            x, _ = jax.lax.scan(_remat(layer, self.config.remat), x, piece)
        return _norm(x)

    def head(self, start: int = 0, stop: int | None = None) -> Float[Array, "embed ids"]:
        """What scores the ids start..stop - 1 (all by default): rows of the table, transposed.

        A part of the rows is held whole by every device. A loop takes it as an argument: made in
        the loop's own program it would be made again in every call.
        """
        table = self.table[...].astype(self.config.dtype)
        if (start, stop) not in ((0, None), (0, self.config.vocab_size)):
            # A part of a split axis need not be evenly split, so this one is not split.
            table = jax.reshard(table, jax.P(None, None))[start:stop]
        return table.T

    def logits(
        self, hidden: Float[Array, "*lead embed"], head: Float[Array, "embed ids"] | None = None
    ) -> Float[Array, "*lead ids"]:
        """Scores of the ids of `head(...)`, by default of all, in float32."""
        head = self.head() if head is None else head
        return jnp.einsum(
            "...d,dv->...v",
            hidden,
            head,
            preferred_element_type=jnp.float32,
            out_sharding=jax.P(*_lead(hidden), jax.typeof(head).sharding.spec[1]),
        )

    def prefill(
        self,
        ids: Int[Array, "batch length"],
        positions: Int[Array, "batch length"] | None = None,
    ) -> tuple[
        Float[Array, "batch length embed"],
        list[Float[Array, "layers batch heads length head_dim"]],
        list[Float[Array, "layers batch heads length head_dim"]],
    ]:
        """(hidden states after the final norm, keys, values) of prompts; the last two by piece.

        Prompts are padded on the right: attention is causal, so what comes after the last real
        token cannot change it, and `decode_step` is told by `LayerCache.valid` which slots hold tokens.
        """

        def layer(x, block):
            q, k, v = block.project(x)
            # A cache is never split over its length, so that one slot can be written cheaply.
            cache = spec("batch", "heads", None, "head_dim")
            saved = [jax.reshard(jnp.swapaxes(array, 1, 2), cache) for array in (k, v)]
            attended = attention(q, k, v, implementation=self.config.attention)
            return block.finish(x, attended), saved

        x, saved = self._embed(ids, positions), []
        for piece in self.stacks:
            x, both = jax.lax.scan(layer, x, piece)
            saved.append(both)
        return _norm(x), [keys for keys, _ in saved], [values for _, values in saved]

    def decode_step(
        self,
        ids: Int[Array, "streams group sample"],
        positions: Int[Array, "streams group sample"],
        prompts: Sequence[LayerCache],
        answers: Sequence[LayerCache],
    ) -> tuple[
        Float[Array, "streams group sample embed"],
        list[Float[Array, "layers streams group sample heads head_dim"]],
        list[Float[Array, "layers streams group sample heads head_dim"]],
    ]:
        """(hidden state, new keys, new values) of one more token a sample of every stream.

        The cache is only read: the caller writes the new keys and values of all layers at once.
        Keys and values, old and new, are by piece.

        Args:
          ids: the new tokens.
          positions: their rows of the position table.
          prompts, answers: the cache, one of each a stream, as `cached_attention` takes them but
            with lists of stacks, each with a leading axis of layers, for keys and values.
        """
        masks = [(p.valid, a.valid) for p, a in zip(prompts, answers, strict=True)]

        def layer(x, inputs):
            block, cache = inputs
            q, k, v = block.project(x)
            attended = [
                cached_attention(
                    q[stream], k[stream], v[stream],
                    LayerCache(keys, values, masks[stream][0]),
                    LayerCache(answer_keys, answer_values, masks[stream][1]),
                )
                for stream, (keys, values, answer_keys, answer_values) in enumerate(cache)
            ]  # fmt: skip
            return block.finish(x, jnp.stack(attended)), (k, v)

        x, saved = self._embed(ids, positions, jax.P(None, *spec("batch"), None)), []
        for number, piece in enumerate(self.stacks):
            cache = [
                (p.keys[number], p.values[number], a.keys[number], a.values[number])
                for p, a in zip(prompts, answers, strict=True)
            ]
            # A piece of one layer is no loop, and its arrays are used where they are.
            x, both = jax.lax.scan(layer, x, (piece, cache), unroll=len(self.stacks) > 1)
            saved.append(both)
        return _norm(x), [keys for keys, _ in saved], [values for _, values in saved]

    def _embed(self, ids, positions, sharding: jax.P | None = None):
        """Token plus position embeddings, [*ids, embed] in the compute dtype."""
        sharding = spec("batch", "length") if sharding is None else sharding
        if positions is None:
            length, longest = ids.shape[1], self.config.max_length
            if length > longest:
                raise ValueError(f"{length} tokens in a row, but max_length is {longest}")
            positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), ids.shape)
        x = _lookup(self.table[...], ids, sharding)
        x = x + _lookup(self.positions[...], positions, sharding)
        return x.astype(self.config.dtype)


def _product(subscripts: str, x: Array, weight: nnx.Param | Int8Weight, sharding: jax.P) -> Array:
    """`jnp.einsum` of activations and a weight, in the dtype of the activations."""
    if isinstance(weight, Int8Weight):
        return int8.einsum(subscripts, x, weight.values[...], weight.scale[...], sharding)
    return jnp.einsum(subscripts, x, weight[...].astype(x.dtype), out_sharding=sharding)


def _lookup(table, ids, sharding: jax.P):
    """Rows of a table whose columns are split over the axes that also split the batch.

    Gathering the table first would hold all of it on every device. Instead every device looks up
    its columns for all the rows of its column group, and the rows are then exchanged: activations
    move, not the table, and the table's gradient is born split like the table.
    """
    columns = RULES["weight_embed"]
    rest = jax.P(
        *(tuple(axis for axis in _axes(entry) if axis not in _axes(columns)) for entry in sharding)
    )
    found = table.at[jax.reshard(ids, rest)].get(out_sharding=jax.P(*rest, columns))
    return jax.reshard(found, jax.P(*sharding, None))


def _axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _lead(x) -> tuple:
    """How all axes of `x` but the last are split."""
    return tuple(jax.typeof(x).sharding.spec)[: x.ndim - 1]


def _norm(x):
    """Layer norm without parameters, computed in float32."""
    wide = x.astype(jnp.float32)
    wide = wide - wide.mean(axis=-1, keepdims=True)
    variance = jnp.square(wide).mean(axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(variance + 1e-5)).astype(x.dtype)


def _remat(layer, policy: str):
    if policy == "none":
        return layer
    saved = {
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        "attention": jax.checkpoint_policies.save_only_these_names(SAVED),
        "full": None,
    }[policy]
    # Inside a scan nothing can be merged across iterations anyway, so the barrier is only cost.
    return jax.checkpoint(layer, policy=saved, prevent_cse=False)


def _truncated_normal(std: float):
    # `stddev` is the sd before cutting, as in torch's `trunc_normal_`, which the original used; at
    # 3 sd the cut changes the sd by 1.3 %.
    return nnx.initializers.truncated_normal(std, lower=-3.0, upper=3.0)


def _sinusoids(std: float):
    """An initializer of [length, embed]: sines in the first half of the columns, then cosines."""

    def init(key, shape, dtype, sharding):
        del key
        length, embed = shape
        rates = float(length) ** -(jnp.arange(0, embed, 2, dtype=dtype) / embed)
        angles = jnp.arange(length, dtype=dtype)[:, None] * rates
        # A sine's mean square is 1/2.
        table = std * 2**0.5 * jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
        return jax.reshard(table, sharding)

    return init
