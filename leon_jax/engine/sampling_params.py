"""How the ids of one sample are chosen, and batches in which every row has its own parameters.

`SamplingParams` is a small pytree whose numbers are leaves. Parameters of one variant (the same
types and static fields) are stacked, so rows that differ in weight, temperature or top-p share one
computation. Each further variant in a batch is computed for all rows and used where it applies.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from leon_jax.config import UserError
from leon_jax.engine.guidance import (
    ClassifierFree,
    Contrastive,
    Guidance,
    Plain,
    TwoConditions,
    make_guidance,
)
from leon_jax.engine.samplers import (
    Categorical,
    Greedy,
    Sampler,
    drop_bad_logits,
    make_sampler,
)

# Where a generated text is cut unless another limit is given.
MAX_TOKENS = 32

_GUIDANCES = {kind.__name__: kind for kind in (Plain, ClassifierFree, TwoConditions, Contrastive)}
_SAMPLERS = {kind.__name__: kind for kind in (Greedy, Categorical)}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("guidance", "image", "text", "guidance_start", "guidance_stop"),
    meta_fields=(),
    # The grammar of a request is made of it; the compiled programs need not know it.
    drop_fields=("max_tokens",),
)
@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the ids of one sample are chosen.

    Attributes:
      guidance: how the streams are merged while an image is generated. Texts use stream 0 alone.
      image, text: how an id is sampled from the logits.
      guidance_start, guidance_stop: which ids of an image, counted from 0, are guided. The others
        are sampled from stream 0. Once all rows of a batch are past `guidance_stop`, the other
        streams are not computed. A late start saves nothing, for the other streams have to read
        the ids before it.
      max_tokens: the most tokens of each generated text, 1 or more.
    """

    guidance: Guidance = dataclasses.field(default_factory=Plain)
    image: Sampler = dataclasses.field(default_factory=Categorical)
    text: Sampler = dataclasses.field(default_factory=Categorical)
    guidance_start: int = 0
    guidance_stop: int = 2**30
    max_tokens: int = MAX_TOKENS

    @classmethod
    def of(
        cls,
        *,
        guidance: float = 1.0,
        temperature: float = 1.0,
        top_p: float | None = None,
        top_k: int | None = None,
        max_tokens: int = MAX_TOKENS,
    ) -> "SamplingParams":
        """Classifier-free guidance for images, and one sampler for images and texts.

        Args:
          guidance: the weight, 0 or more; 1 is no guidance.
          temperature, top_p, top_k: see `leon_jax.engine.samplers.make_sampler`.
          max_tokens: the most tokens of each generated text.

        Raises:
          UserError: a number is out of range.
        """
        sampler = make_sampler(temperature, top_p, top_k)
        params = cls(make_guidance(guidance), sampler, sampler, max_tokens=max_tokens)
        params.check()
        return params

    def check(self) -> None:
        """Checks all numbers; inside compiled programs they are not known.

        Raises:
          UserError: one is out of range, or of another type.
        """
        if not isinstance(self.guidance, Guidance):
            raise UserError(f"guidance is {self.guidance!r}; give one as ClassifierFree(3.0)")
        for sampler in (self.image, self.text):
            if not callable(sampler):
                raise UserError(f"a sampler is {sampler!r}; give one as Categorical(top_p=0.9)")
        for part in (self.guidance, self.image, self.text):
            part.check()
        if not 0 <= self.guidance_start <= self.guidance_stop:
            raise UserError(
                f"guidance_start is {self.guidance_start} and guidance_stop "
                f"{self.guidance_stop}; 0 <= guidance_start <= guidance_stop is needed"
            )
        if self.max_tokens < 1:
            raise UserError(f"max_tokens is {self.max_tokens}; it must be at least 1")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them back.

        Guidance and samplers are `{"type": class name, field: value, ...}`.
        """
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("guidance", "image", "text"):
            part: Any = values[name]
            values[name] = {"type": type(part).__name__} | dataclasses.asdict(part)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SamplingParams":
        """Reads what `to_dict` returned; fields that are left out have their defaults.

        Raises:
          UserError: a key or a type is unknown, or a number is out of range.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(names)):
            raise UserError(f"sampling.{unknown[0]} is unknown; its keys are {', '.join(names)}")
        parsed = dict(values)
        for name in ("guidance", "image", "text"):
            if name in parsed:
                types = _GUIDANCES if name == "guidance" else _SAMPLERS
                parsed[name] = _parse(f"sampling.{name}", parsed[name], types)
        params = cls(**parsed)
        params.check()
        return params


def _parse(key: str, values: Any, types: Mapping[str, type]) -> Any:
    """An object of one of the types from `{"type": name, field: value, ...}`."""
    known = ", ".join(types)
    if not isinstance(values, Mapping) or values.get("type") not in types:
        raise UserError(f'{key} is {values!r}; it must be {{"type": ...}} with one of {known}')
    fields = {name: value for name, value in values.items() if name != "type"}
    try:
        return types[values["type"]](**fields)
    except TypeError as error:
        raise UserError(f"{key} is {values!r}; {values['type']} has no such field") from error


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BatchedParams:
    """The sampling parameters of all rows.

    Attributes:
      variants: one `SamplingParams` a variant; every leaf is [group, sample].
      variant_ids: int32[group, sample], the variant of each row.
    """

    variants: tuple[SamplingParams, ...]
    variant_ids: Int[Array, "group sample"]

    @classmethod
    def of(
        cls, params: Sequence[Sequence[SamplingParams]], variants: Sequence[SamplingParams]
    ) -> "BatchedParams":
        """The parameters of [group][sample] as NumPy arrays.

        Args:
          params: each must be of one of the variants.
          variants: one example of every variant.
        """
        rows = [row for samples in params for row in samples]
        shape = len(params), len(params[0])
        stacked, variant_ids = [], np.zeros(shape, np.int32)
        for number, example in enumerate(variants):
            matches = [variant_key(row) == variant_key(example) for row in rows]
            variant_ids[np.reshape(matches, shape)] = number
            filled = [r if is_match else example for r, is_match in zip(rows, matches, strict=True)]
            stacked.append(jax.tree.map(lambda *leaves: _stack(leaves, shape), *filled))
        return cls(tuple(stacked), variant_ids)  # type: ignore[arg-type]

    def needs_guidance(
        self, used: Int[Array, "group sample"], has_later_image: Bool[Array, "group sample"]
    ) -> Bool[Array, "group sample"]:
        """Whether a row still has a guided image id to generate.

        Args:
          used: how many ids of its current image are generated.
          has_later_image: whether another image comes after the current span.
        """
        needed = [
            (has_later_image | (used < variant.guidance_stop))
            & (variant.guidance.streams > 1)
            & (self.variant_ids == number)
            for number, variant in enumerate(self.variants)
        ]
        return jnp.stack(needed).any(axis=0)

    def sample_image(
        self,
        logits: Float[Array, "streams group sample ids"],
        used: Int[Array, "group sample"],
        keys: Key[Array, "group sample"],
    ) -> tuple[Int[Array, "group sample"], Bool[Array, "group sample"]]:
        """An id a row, 0 for the first that `logits` scores, and whether it can be used."""

        def sample(variant: SamplingParams, logits, used, key):
            rows = logits[:, None]
            merged = variant.guidance(rows[: variant.guidance.streams])
            is_guided = (used >= variant.guidance_start) & (used < variant.guidance_stop)
            return _sample(variant.image, jnp.where(is_guided, merged, rows[0]), key[None])

        return self._per_variant(sample, 1, logits, used, keys)

    def sample_text(
        self, logits: Float[Array, "group sample ids"], keys: Key[Array, "group sample"]
    ) -> tuple[Int[Array, "group sample"], Bool[Array, "group sample"]]:
        """An id a row, and whether it can be used. Ids with logits of -inf are forbidden."""

        def sample(variant: SamplingParams, logits, key):
            return _sample(variant.text, logits[None], key[None])

        return self._per_variant(sample, 0, logits, keys)

    def _per_variant(
        self, sample, axis: int, logits: Array, *others: Array
    ) -> tuple[Int[Array, "group sample"], Bool[Array, "group sample"]]:
        """Calls `sample` for each variant and row; returns what the row's own variant gives."""
        axes = (0, axis, *[0] * len(others))
        rows = jax.vmap(jax.vmap(sample, axes), axes)
        ids, usable = rows(self.variants[0], logits, *others)
        for number, variant in enumerate(self.variants[1:], start=1):
            other_ids, other_usable = rows(variant, logits, *others)
            ids = jnp.where(self.variant_ids == number, other_ids, ids)
            usable = jnp.where(self.variant_ids == number, other_usable, usable)
        return ids.astype(jnp.int32), usable


def distinct_variants(params: Sequence[SamplingParams]) -> tuple[SamplingParams, ...]:
    """One example of every variant, in an order that does not depend on theirs."""
    examples: dict[tuple[str, ...], SamplingParams] = {}
    for each in params:
        examples.setdefault(variant_key(each), each)
    return tuple(examples[key] for key in sorted(examples))


def variant_key(params: SamplingParams) -> tuple[str, ...]:
    """Equal for parameters of one variant.

    JAX calls the structures of two types equal if their fields are alike, so the types count too.
    """
    parts = params.guidance, params.image, params.text
    types = [f"{type(part).__module__}.{type(part).__qualname__}" for part in parts]
    return str(jax.tree.structure(params)), *types


def _sample(
    sampler: Sampler, logits: Float[Array, "1 ids"], keys: Key[Array, "1"]
) -> tuple[Int[Array, ""], Bool[Array, ""]]:
    """One id, and whether its logit allows it: whatever a sampler returns, only such ids count."""
    logits = drop_bad_logits(logits)
    (chosen,) = sampler(logits, keys)
    in_range = (chosen >= 0) & (chosen < logits.shape[-1])
    chosen = jnp.clip(chosen, 0, logits.shape[-1] - 1)
    return chosen, in_range & (logits[0, chosen] > -jnp.inf)


def _stack(leaves: Sequence[float], shape: tuple[int, int]) -> np.ndarray:
    return np.array(leaves, np.float32).reshape(shape)
