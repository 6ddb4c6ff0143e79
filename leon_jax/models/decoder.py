"""The CM3Leon decoder: a transformer like OPT over one sequence of text and image tokens.

The paper (Yu et al. 2023, arXiv 2309.02591, section 2.3) specifies: no biases, no dropout, layer
norms without parameters, learned absolute positions, truncated-normal initialisation (sd 0.006, cut
at 3 sd; positions sd 0.0002) and zero-initialised residual output projections, so that at step 0
every block is the identity. The following is from its training code (metaseq): pre-norm with a
final norm, eps 1e-5, ReLU in an MLP of 4 x embed, tied input and output embeddings, no embedding
scale. The position table has `max_length` rows, without the original's two extra rows (padding and
an offset), which are never read.

Layers are stacked (every block weight has a leading `layers` axis) and scanned. Master weights are
float32. Activations and matmul operands are cast to `DecoderConfig.dtype`.

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
from leon_jax.ops.products import Products, operand_dtype
from leon_jax.sharding import RULES, spec

# The embedding row that starts as zeros: `leon_jax.vocabulary.Vocabulary.pad`.
_PAD = 1

# A layer's attention, from (query, key, value) to the attended values. It is the only difference
# between training, prefill and a decode step.
Attend = Callable[[Array, Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and options of a decoder.

    Attributes:
      vocab_size: rows of the tied embedding table; `leon_jax.vocabulary.Vocabulary.size`.
      max_length: longest sequence; rows of the learned position table.
      layers: number of layers.
      embed: width of the model.
      heads: number of attention heads.
      mlp: hidden width of the MLP.
      dtype: compute dtype. The weights are float32.
      products: dtype of the operands of the products in training and likelihoods: "dtype",
        "bfloat16" with float32 sums, or "auto" (see `leon_jax.ops.products.operand_dtype`).
      remat: what the backward pass recomputes inside a layer: nothing ("none"), everything except
        the products with weights ("dots"), everything except the attention's result
        ("attention"), or everything ("full").
      attention: the implementation (see `leon_jax.ops.attention`); "auto" depends on the platform.
      init_std: initial sd of the weights, which are truncated normals.
      position_std: initial sd of the positions.
      position_init: initial positions: truncated normals ("normal", as in the paper) or sinusoids
        with wavelengths from 2 pi to 2 pi `max_length` (Vaswani et al. 2017, section 3.5, with
        `max_length` instead of 10,000). Both are trained. With sinusoids, "one row up" in an image
        is a rotation from the start, which saves a small model much of its training.
      part_step: every part of a document starts at a multiple of this many positions (see
        `leon_jax.vocabulary.Vocabulary.positions`). 1, as in the paper: positions have no gaps.
        With a step, a small model can attend to the same position in the retrieved image with one
        attention head. Without a step, the distance varies with the lengths of the captions.

    Raises:
      UserError: a size is below 1, `embed` is not a multiple of `heads`, or `embed` is odd with
        sinusoids.
    """

    vocab_size: int
    max_length: int
    layers: int
    embed: int
    heads: int
    mlp: int
    dtype: Literal["float32", "bfloat16"] = "float32"
    products: Products = "dtype"
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
            raise UserError(f"embed is {self.embed}; it must be even for sinusoids")

    @property
    def head_dim(self) -> int:
        return self.embed // self.heads

    def parameter_count(self) -> int:
        """Returns the number of weights: blocks, the tied table and the positions."""
        block = 4 * self.embed**2 + 2 * self.embed * self.mlp
        return self.layers * block + (self.vocab_size + self.max_length) * self.embed

    def flops_per_token(self, length: int) -> int:
        """Returns the floating-point operations of a training step for each token.

        It counts the matmuls of the forward and backward pass (three times the forward pass), with
        the tied table once (as output head) and half of the attention square (causal). It does not
        count recomputation.

        Args:
          length: number of tokens of a row.
        """
        weights = self.layers * (4 * self.embed**2 + 2 * self.embed * self.mlp)
        weights += self.vocab_size * self.embed
        return 6 * weights + 6 * self.layers * length * self.embed


class Blocks(nnx.Module):
    """The stacked weights of all layers. Inside the scan, an instance holds one layer."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        layers, embed, mlp = config.layers, config.embed, config.mlp
        heads, head_dim = config.heads, config.head_dim
        normal = _truncated_normal(config.init_std)
        # With zeros every residual branch is exactly zero at step 0.
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

    def __call__(self, x: Float[Array, "*lead embed"], attend: Attend, operands=None):
        """Runs one layer: x + attention(norm(x)), then x + mlp(norm(x)).

        Args:
          x: the residual stream.
          attend: maps (query, key, value), each [*lead, heads, head_dim], to the attended values,
            [*lead, heads, head_dim].
          operands: dtype of the operands of the products with weights; None: that of x.

        Returns:
          The new residual stream, and (key, value).
        """
        q, k, v = self.qkv(_norm(x), operands)
        x = x + self.output(attend(q, k, v), operands)
        x = x + self.mlp(_norm(x), operands)
        return x, (k, v)

    def qkv(self, x: Float[Array, "*lead embed"], operands=None):
        """Returns (query, key, value), each [*lead, heads, head_dim]."""
        sharding = jax.P(*_lead(x), *spec("heads", "head_dim"))
        return tuple(
            product("...d,dhk->...hk", x, weight, sharding, operands)
            for weight in (self.query, self.key, self.value)
        )

    def output(self, attended: Float[Array, "*lead heads head_dim"], operands=None):
        """Projects the attended values of all heads to the width of the model."""
        sharding = jax.P(*_lead(attended, 2), None)
        return product("...hk,hkd->...d", attended, self.out, sharding, operands)

    def mlp(self, x: Float[Array, "*lead embed"], operands=None) -> Float[Array, "*lead embed"]:
        """Runs the MLP: two products with a ReLU between them."""
        wide, narrow = jax.P(*_lead(x), *spec("mlp")), jax.P(*_lead(x), None)
        hidden = product("...d,df->...f", x, self.fc1, wide, operands)
        return product("...f,fd->...d", jax.nn.relu(hidden), self.fc2, narrow, operands)


class Decoder(nnx.Module):
    """The decoder. It can be created inside `jax.jit`, which shards it, and `jax.eval_shape`."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        table = _truncated_normal(config.init_std)(
            rngs.params(),
            (config.vocab_size, config.embed),
            jnp.float32,
            spec("vocab", "weight_embed"),
        )
        is_not_pad = jnp.arange(config.vocab_size)[:, None] != _PAD
        self.table = nnx.Param(table * is_not_pad)
        initializer = _sinusoids if config.position_init == "sinusoids" else _truncated_normal
        self.positions = nnx.Param(
            initializer(config.position_std)(
                rngs.params(),
                (config.max_length, config.embed),
                jnp.float32,
                spec(None, "weight_embed"),
            )
        )
        self.blocks: Blocks | nnx.List = Blocks(config, rngs=rngs)

    @property
    def operands(self) -> jnp.dtype:
        """The dtype of the operands of the products in training and in likelihoods."""
        return operand_dtype(self.config.products, self.config.dtype)

    @property
    def stacks(self) -> list[Blocks]:
        """The stacks of layers in order: one with all layers or, after `unstack`, one for each."""
        return [self.blocks] if isinstance(self.blocks, Blocks) else list(self.blocks)

    def __call__(
        self,
        ids: Int[Array, "batch length"],
        positions: Int[Array, "batch length"] | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
    ) -> Float[Array, "batch length embed"]:
        """Returns the hidden states after the final norm, which `logits` maps to logits.

        Args:
          ids: token ids, 0..vocab_size - 1.
          positions: rows of the position table; None: 0, 1, 2, ... in every row.
          segment_ids: segment of each token. A token attends only to its segment, for packed
            documents. None: one segment in each row.

        Raises:
          ValueError: rows are longer than `max_length` without explicit positions.
        """
        kind, operands = self.config.attention, self.operands

        def attend(q, k, v):
            return attention(
                q, k, v, segment_ids=segment_ids, implementation=kind, operands=operands
            )

        def layer(x, blocks):
            x, _ = blocks(x, attend, operands)
            return x, None

        x = self._embed(ids, positions)
        for stack in self.stacks:
            x, _ = jax.lax.scan(_remat(layer, self.config.remat), x, stack)
        return _norm(x)

    def head(self, start: int = 0, stop: int | None = None) -> Float[Array, "embed ids"]:
        """Returns the output head of the ids start..stop - 1: rows of the table, transposed.

        A head of a part of the ids is replicated on every device. Pass the head to a decode loop as
        an argument, because a head that the loop's program computes is computed in every call.

        Args:
          start: the first id.
          stop: one past the last id; None: all ids from `start`.
        """
        table = self.table[...].astype(self.config.dtype)
        if (start, stop) not in ((0, None), (0, self.config.vocab_size)):
            # A part of a split axis may not divide evenly, so it is not split.
            table = jax.reshard(table, jax.P(None, None))[start:stop]
        return table.T

    def logits(
        self, hidden: Float[Array, "*lead embed"], head: Float[Array, "embed ids"] | None = None
    ) -> Float[Array, "*lead ids"]:
        """Returns the float32 logits of the ids of `head` (see `head`); None: of all ids."""
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
        """Runs the prompts, and returns their hidden states, keys and values.

        Prompts are padded on the right. Attention is causal, so the padding does not change the
        tokens before it. `LayerCache.valid` marks the slots with tokens for `decode_step`.

        Returns:
          Hidden states after the final norm, and keys and values as lists by stack.

        Raises:
          ValueError: see `__call__`.
        """

        def attend(q, k, v):
            return attention(q, k, v, implementation=self.config.attention)

        def layer(x, blocks):
            x, keys_values = blocks(x, attend)
            # A cache is not split over its length, so that writing one slot is cheap.
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
        """Runs one more token of each sample of every stream.

        It only reads the cache. The caller writes the new keys and values of all layers at once.

        Args:
          ids: the new tokens.
          positions: rows of the position table for the new tokens.
          prompts, outputs: the caches of the prompts and of the generated tokens, one for each
            stream. They are as in `cached_attention`, but keys and values are lists by stack
            (`stacks`), each with a leading axis of layers.

        Returns:
          Hidden states after the final norm, and new keys and values as lists by stack.
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
            # A stack of one layer needs no loop, so its arrays are not copied.
            x, (stack_keys, stack_values) = jax.lax.scan(
                layer, x, (stack, cache), unroll=len(self.stacks) > 1
            )
            keys.append(stack_keys)
            values.append(stack_values)
        return _norm(x), keys, values

    def _embed(self, ids, positions, sharding: jax.P | None = None):
        """Returns the sum of token and position embeddings, [*ids, embed], in the compute dtype."""
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
    """Looks up rows of a table whose columns are split over axes that also split the batch.

    Gathering the table first would replicate it on every device. Instead each device looks up its
    columns for all rows of its column group, and the devices then exchange the rows. So devices
    exchange activations, not the table, and the gradient of the table is split like the table.
    """
    columns = RULES["weight_embed"]
    other_axes = jax.P(
        *(tuple(axis for axis in _axes(entry) if axis not in _axes(columns)) for entry in sharding)
    )
    rows = table.at[jax.reshard(ids, other_axes)].get(out_sharding=jax.P(*other_axes, columns))
    return jax.reshard(rows, jax.P(*sharding, None))


def _axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _lead(x, last: int = 1) -> tuple:
    """Returns the sharding of all axes of `x` except the `last` ones."""
    return tuple(jax.typeof(x).sharding.spec)[: x.ndim - last]


def _norm(x):
    """Computes layer norm without parameters, in float32."""
    centred = x.astype(jnp.float32)
    centred = centred - centred.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + 1e-5)).astype(x.dtype)


def _remat(layer, policy: str):
    if policy == "none":
        return layer
    saved = {
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        "attention": jax.checkpoint_policies.save_only_these_names(SAVED),
        "full": None,
    }[policy]
    # XLA cannot merge computations across iterations of a scan, so the barrier is not needed.
    return jax.checkpoint(layer, policy=saved, prevent_cse=False)


def _truncated_normal(std: float):
    # `stddev` is the sd before the cut, as in torch's `trunc_normal_`, which the original uses. A
    # cut at 3 sd changes the sd by 1.3 %.
    return nnx.initializers.truncated_normal(std, lower=-3.0, upper=3.0)


def _sinusoids(std: float):
    """Returns an initializer of [length, embed]: columns of sines, then columns of cosines."""

    def init(key, shape, dtype, sharding):
        del key
        length, embed = shape
        rates = float(length) ** -(jnp.arange(0, embed, 2, dtype=dtype) / embed)
        angles = jnp.arange(length, dtype=dtype)[:, None] * rates
        # A sine's mean square is 1/2.
        table = std * 2**0.5 * jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
        return jax.reshard(table, sharding)

    return init
