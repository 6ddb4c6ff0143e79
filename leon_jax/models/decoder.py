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
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from leon_jax.config import UserError
from leon_jax.models.int8_weight import product
from leon_jax.ops.attention import SAVED, Implementation, LayerCache, attention, cached_attention
from leon_jax.sharding import RULES, spec

# The embedding row that starts as zeros: `leon_jax.vocabulary.Vocabulary.pad`.
_PAD = 1

# What a layer does with its (query, key, value): all that differs between training, prefill and a
# decoding step.
Attend = Callable[[Array, Array, Array], Array]


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
    part_step: int = 1

    FORMER_KEYS: ClassVar[Mapping[str, int]] = {"pad_id": _PAD}

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


class Blocks(nnx.Module):
    """The weights of all layers, stacked. In the scan over layers an instance holds one layer's."""

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

    def __call__(self, x: Float[Array, "*lead embed"], attend: Attend):
        """One layer: x + attention(norm(x)), then x + mlp(norm(x)).

        Args:
          x: the residual stream.
          attend: (query, key, value), each [*lead, heads, head_dim], to what is attended,
            [*lead, heads, head_dim].

        Returns:
          The new residual stream, and (key, value).
        """
        q, k, v = self.qkv(_norm(x))
        x = x + self.output(attend(q, k, v))
        x = x + self.mlp(_norm(x))
        return x, (k, v)

    def qkv(self, x: Float[Array, "*lead embed"]):
        """(query, key, value), each [*lead, heads, head_dim]."""
        sharding = jax.P(*_lead(x), *spec("heads", "head_dim"))
        return tuple(
            product("...d,dhk->...hk", x, weight, sharding)
            for weight in (self.query, self.key, self.value)
        )

    def output(self, attended: Float[Array, "*lead heads head_dim"]) -> Float[Array, "*lead embed"]:
        """The heads' results, mixed back into the width of the model."""
        narrow = jax.P(*_lead(attended, 2), None)
        return product("...hk,hkd->...d", attended, self.out, narrow)

    def mlp(self, x: Float[Array, "*lead embed"]) -> Float[Array, "*lead embed"]:
        """Two products with a ReLU between them."""
        hidden = product("...d,df->...f", x, self.fc1, jax.P(*_lead(x), *spec("mlp")))
        return product("...f,fd->...d", jax.nn.relu(hidden), self.fc2, jax.P(*_lead(x), None))


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
        keep = jnp.arange(config.vocab_size)[:, None] != _PAD
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
        self.blocks: Blocks | nnx.List = Blocks(config, rngs=rngs)

    @property
    def stacks(self) -> list[Blocks]:
        """The layers in order: one stack of all, or, after `unstack`, a stack of one for each."""
        return [self.blocks] if isinstance(self.blocks, Blocks) else list(self.blocks)

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

        def attend(q, k, v):
            return attention(q, k, v, segment_ids=segment_ids, implementation=self.config.attention)

        def layer(x, blocks):
            x, _ = blocks(x, attend)
            return x, None

        x = self._embed(ids, positions)
        for stack in self.stacks:
            x, _ = jax.lax.scan(_remat(layer, self.config.remat), x, stack)
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
        """(hidden states after the final norm, keys, values) of prompts; the last two by stack.

        Prompts are padded on the right. Attention is causal, so the padding cannot change the
        tokens before it, and `LayerCache.valid` tells `decode_step` which slots hold tokens.
        """

        def attend(q, k, v):
            return attention(q, k, v, implementation=self.config.attention)

        def layer(x, blocks):
            x, keys_values = blocks(x, attend)
            # A cache is never split over its length, so that one slot can be written cheaply.
            cache = spec("batch", "heads", None, "head_dim")
            return x, [jax.reshard(jnp.swapaxes(array, 1, 2), cache) for array in keys_values]

        x, keys, values = self._embed(ids, positions), [], []
        for stack in self.stacks:
            x, (stack_keys, stack_values) = jax.lax.scan(layer, x, stack)
            keys.append(stack_keys)
            values.append(stack_values)
        return _norm(x), keys, values

    def decode_step(
        self,
        ids: Int[Array, "streams group sample"],
        positions: Int[Array, "streams group sample"],
        prompts: Sequence[LayerCache],
        outputs: Sequence[LayerCache],
    ) -> tuple[
        Float[Array, "streams group sample embed"],
        list[Float[Array, "layers streams group sample heads head_dim"]],
        list[Float[Array, "layers streams group sample heads head_dim"]],
    ]:
        """(hidden state, new keys, new values) of one more token a sample of every stream.

        The cache is only read: the caller writes the new keys and values of all layers at once.
        Keys and values, old and new, are lists by stack (`stacks`).

        Args:
          ids: the new tokens.
          positions: their rows of the position table.
          prompts, outputs: the cache, one of each a stream, as `cached_attention` takes them but
            keys and values are lists by stack, each with a leading axis of layers.
        """
        masks = [(p.valid, o.valid) for p, o in zip(prompts, outputs, strict=True)]

        def layer(x, inputs):
            blocks, cache = inputs

            def attend(q, k, v):
                attended = [
                    cached_attention(
                        q[stream], k[stream], v[stream],
                        LayerCache(keys, values, masks[stream][0]),
                        LayerCache(output_keys, output_values, masks[stream][1]),
                    )
                    for stream, (keys, values, output_keys, output_values) in enumerate(cache)
                ]  # fmt: skip
                return jnp.stack(attended)

            return blocks(x, attend)

        x, keys, values = self._embed(ids, positions, jax.P(None, *spec("batch"), None)), [], []
        for number, stack in enumerate(self.stacks):
            cache = [
                (p.keys[number], p.values[number], o.keys[number], o.values[number])
                for p, o in zip(prompts, outputs, strict=True)
            ]
            # A stack of one layer is no loop, and its arrays are used where they are.
            x, (stack_keys, stack_values) = jax.lax.scan(
                layer, x, (stack, cache), unroll=len(self.stacks) > 1
            )
            keys.append(stack_keys)
            values.append(stack_values)
        return _norm(x), keys, values

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
    rows = table.at[jax.reshard(ids, rest)].get(out_sharding=jax.P(*rest, columns))
    return jax.reshard(rows, jax.P(*sharding, None))


def _axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _lead(x, last: int = 1) -> tuple:
    """How all axes of `x` but the last ones are split."""
    return tuple(jax.typeof(x).sharding.spec)[: x.ndim - last]


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
