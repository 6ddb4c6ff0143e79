"""The CM3Leon decoder: a transformer like OPT over one sequence of text and image tokens.

The paper (Yu et al. 2023, arXiv 2309.02591, section 2.3) specifies: no biases, no dropout, layer
norms without parameters, learned absolute positions, truncated-normal initialisation (sd 0.006, cut
at 3 sd; positions sd 0.0002) and zero-initialised residual output projections, so that at step 0
every block is the identity. The following is from its training code (metaseq): pre-norm with a
final norm, eps 1e-5, ReLU in an MLP of 4 x embed, tied input and output embeddings, no embedding
scale. The position table has `max_length` rows, without the original's two extra rows (padding and
an offset), which are never read.

This is the default form. Other forms (`leon_jax.models.decoder_config.Form`) have other norms, MLPs
and positions, fewer heads of keys and values, biases, or an output head of its own.

Layers are stacked (every block weight has a leading `layers` axis) and scanned. Master weights are
float32. Activations and matmul operands are cast to `DecoderConfig.dtype`.

Axes: b batch, t length, d embed, h heads, k head_dim, f mlp, v vocab. In an einsum the leading
`...` is `bt` for whole sequences; for one decoding step it is (streams, groups, samples).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from leon_jax.models.blocks import Blocks, lead_spec, truncated_normal
from leon_jax.models.decoder_config import PAD, DecoderConfig
from leon_jax.ops.attention import SAVED, LayerCache, attention, cached_attention
from leon_jax.ops.norm import normalize
from leon_jax.ops.products import on_cpu, operand_dtype
from leon_jax.ops.rotary import Rotation, grid_rotation, rotation
from leon_jax.sharding import RULES, spec

# The sharding of the tokens of whole sequences.
_TOKENS = spec("batch", "length")
# Deeper decoders are always scanned, so that they compile quickly.
_MOST_UNROLLED = 16


class Decoder(nnx.Module):
    """The decoder. It can be created inside `jax.jit`, which shards it, and `jax.eval_shape`."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config, form = config, config.form
        normal, shape = truncated_normal(config.init_std), (config.vocab_size, config.embed)
        layout = spec("vocab", "weight_embed")
        is_not_pad = jnp.arange(config.vocab_size)[:, None] != PAD
        table = normal(rngs.params(), shape, jnp.float32, layout)
        self.table = nnx.Param(table * is_not_pad)
        if form.positions == "learned":
            initializer = _sinusoids if config.position_init == "sinusoids" else truncated_normal
            self.positions = nnx.Param(
                initializer(config.position_std)(
                    rngs.params(),
                    (config.max_length, config.embed),
                    jnp.float32,
                    spec(None, "weight_embed"),
                )
            )
        self.blocks: Blocks | nnx.List = Blocks(config, rngs=rngs)
        if form.norm_scale:
            self.final_norm_scale = nnx.Param(jnp.ones(config.embed, out_sharding=spec("embed")))
        if form.norm_bias:
            self.final_norm_bias = nnx.Param(jnp.zeros(config.embed, out_sharding=spec("embed")))
        if not form.tied_head:
            shape = (config.head_rows, config.embed)
            self.head_table = nnx.Param(normal(rngs.params(), shape, jnp.float32, layout))

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
        cells: Int[Array, "batch length"] | None = None,
    ) -> Float[Array, "batch length embed"]:
        """Returns the hidden states after the final norm, which `logits` maps to logits.

        Args:
          ids: token ids, 0..vocab_size - 1.
          positions: positions of the tokens; None: 0, 1, 2, ... in every row.
          segment_ids: segment of each token. A token attends only to its segment, for packed
            documents. None: one segment in each row.
          cells: index of each image token in its image, -1 for other tokens; needed only if
            `Form.positions` is "rotary_2d".

        Raises:
          ValueError: rows are longer than `max_length` without explicit positions, or cells are
            missing.
        """
        kind, operands = self.config.attention, self.operands

        def attend(q, k, v):
            return attention(
                q, k, v, segment_ids=segment_ids, implementation=kind, operands=operands
            )

        def layer(x, blocks):
            x, _ = blocks(x, attend, turned, operands)
            return x, None

        positions = self._positions(ids, positions)
        x, turned = self._embed(ids, positions), self._rotation(positions, cells)
        # On CPUs, a scan spends a tenth of a training step on filling arrays with zeros, in which
        # it saves what the backward pass needs.
        is_unrolled = (
            on_cpu() and self.config.remat == "none" and self.config.layers <= _MOST_UNROLLED
        )
        for stack in self.stacks:
            layers = _remat(layer, self.config.remat)
            x, _ = jax.lax.scan(layers, x, stack, unroll=is_unrolled or 1)
        return self._final_norm(x)

    @property
    def head_rows(self) -> Float[Array, "ids embed"]:
        """The output head of `DecoderConfig.head_ids`: the embedding table, or separate weights."""
        return (self.table if self.config.form.tied_head else self.head_table)[...]

    def head(self, start: int | None = None, stop: int | None = None) -> Float[Array, "embed ids"]:
        """Returns the output head of the ids start..stop - 1: `head_rows` of them, transposed.

        A head of a part of the ids is replicated on every device. Pass the head to a decode loop as
        an argument, because a head that the loop's program computes is computed in every call.

        Args:
          start: the first id; None: the first that the head has a row for.
          stop: one past the last id; None: one past the last that the head has a row for.

        Raises:
          ValueError: the head has no row for some of the ids.
        """
        first, end = self.config.head_ids
        start, stop = first if start is None else start, end if stop is None else stop
        if not first <= start < stop <= end:
            raise ValueError(
                f"no head for the ids {start} to {stop - 1}; it has {first} to {end - 1}"
            )
        table = self.head_rows.astype(self.config.dtype)
        if (start, stop) != (first, end):
            # A part of a split axis may not divide evenly, so it is not split.
            table = jax.reshard(table, jax.P(None, None))[start - first : stop - first]
        return table.T

    def logits(
        self, hidden: Float[Array, "*lead embed"], head: Float[Array, "embed ids"] | None = None
    ) -> Float[Array, "*lead ids"]:
        """Returns the float32 logits of the ids of `head`; None: of `DecoderConfig.head_ids`."""
        head = self.head() if head is None else head
        return jnp.einsum(
            "...d,dv->...v",
            hidden,
            head,
            preferred_element_type=jnp.float32,
            out_sharding=jax.P(*lead_spec(hidden), jax.typeof(head).sharding.spec[1]),
        )

    def prefill(
        self,
        ids: Int[Array, "batch length"],
        positions: Int[Array, "batch length"] | None = None,
        cells: Int[Array, "batch length"] | None = None,
    ) -> tuple[
        Float[Array, "batch length embed"],
        list[Float[Array, "layers batch kv_heads length head_dim"]],
        list[Float[Array, "layers batch kv_heads length head_dim"]],
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
            x, keys_values = blocks(x, attend, turned)
            # A cache is not split over its length, so that writing one slot is cheap.
            cache = spec("batch", "heads", None, "head_dim")
            return x, [jax.reshard(jnp.swapaxes(array, 1, 2), cache) for array in keys_values]

        positions = self._positions(ids, positions)
        x, turned = self._embed(ids, positions), self._rotation(positions, cells)
        keys, values = [], []
        for stack in self.stacks:
            x, (stack_keys, stack_values) = jax.lax.scan(layer, x, stack)
            keys.append(stack_keys)
            values.append(stack_values)
        return self._final_norm(x), keys, values

    def decode_step(
        self,
        ids: Int[Array, "streams group sample"],
        positions: Int[Array, "streams group sample"],
        prompts: Sequence[LayerCache],
        outputs: Sequence[LayerCache],
        cells: Int[Array, "streams group sample"] | None = None,
    ) -> tuple[
        Float[Array, "streams group sample embed"],
        list[Float[Array, "layers streams group sample kv_heads head_dim"]],
        list[Float[Array, "layers streams group sample kv_heads head_dim"]],
    ]:
        """Runs one more token of each sample of every stream.

        It only reads the cache. The caller writes the new keys and values of all layers at once.

        Args:
          ids: the new tokens.
          positions: positions of the new tokens.
          prompts, outputs: the caches of the prompts and of the generated tokens, one for each
            stream. They are as in `cached_attention`, but keys and values are lists by stack
            (`stacks`), each with a leading axis of layers.
          cells: see `__call__`.

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

            return blocks(x, attend, turned)

        layout = jax.P(None, *spec("batch"), None)
        x, turned = self._embed(ids, positions, layout), self._rotation(positions, cells, layout)
        keys, values = [], []
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
        return self._final_norm(x), keys, values

    def _positions(self, ids: Array, positions: Array | None) -> Array:
        """Returns the positions of whole sequences; without explicit ones, 0, 1, 2, ..."""
        if positions is not None:
            return positions
        length, longest = ids.shape[1], self.config.max_length
        if length > longest:
            raise ValueError(f"{length} tokens in a row, but max_length is {longest}")
        return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), ids.shape)

    def _embed(self, ids: Array, positions: Array, sharding: jax.P = _TOKENS) -> Array:
        """Returns the embeddings of tokens and of learned positions, [*ids, embed]."""
        dtype = self.config.dtype
        x = _lookup(self.table[...], ids, sharding, dtype).astype(jnp.float32)
        if self.config.form.embed_scale != 1:
            x = x * self.config.form.embed_scale
        if self.config.form.positions == "learned":
            x = x + _lookup(self.positions[...], positions, sharding, dtype)
        return x.astype(dtype)

    def _rotation(
        self, positions: Array, cells: Array | None, sharding: jax.P = _TOKENS
    ) -> Rotation | None:
        """Returns the rotation of queries and keys; None if positions are learned."""
        form, head_dim = self.config.form, self.config.head_dim
        if form.positions == "learned":
            return None
        positions = jax.reshard(positions, sharding)
        if form.positions == "rotary":
            return rotation(positions, head_dim=head_dim, base=form.rotary_base)
        if cells is None:
            raise ValueError("positions are rotary_2d; the cells of the tokens are missing")
        return grid_rotation(
            positions,
            jax.reshard(cells, sharding),
            form.image_columns,
            head_dim=head_dim,
            base=form.rotary_base,
            outside=form.outside_images,
        )

    def _final_norm(self, x: Array) -> Array:
        form = self.config.form
        scale = self.final_norm_scale[...] if form.norm_scale else None
        bias = self.final_norm_bias[...] if form.norm_bias else None
        return normalize(x, form.norm, scale, bias, form.norm_epsilon)


def _lookup(table, ids, sharding: jax.P, dtype: str):
    """Looks up rows of a table whose columns are split over axes that also split the batch.

    Gathering the table first would replicate it on every device. Instead each device looks up its
    columns for all rows of its column group, and the devices then exchange the rows. So devices
    exchange activations, not the table, and the gradient of the table is split like the table. The
    rows are exchanged in `dtype`.
    """
    columns = RULES["weight_embed"]
    other_axes = jax.P(
        *(tuple(axis for axis in _axes(entry) if axis not in _axes(columns)) for entry in sharding)
    )
    rows = table.at[jax.reshard(ids, other_axes)].get(out_sharding=jax.P(*other_axes, columns))
    return jax.reshard(rows.astype(dtype), jax.P(*sharding, None))


def _axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _remat(layer, policy: str):
    if policy == "none":
        return layer
    dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    attention = jax.checkpoint_policies.save_only_these_names(SAVED)
    saved = {
        "dots_and_attention": jax.checkpoint_policies.save_from_both_policies(dots, attention),
        "dots": dots,
        "attention": attention,
        "full": None,
    }[policy]
    # XLA cannot merge computations across iterations of a scan, so the barrier is not needed.
    return jax.checkpoint(layer, policy=saved, prevent_cse=False)


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
