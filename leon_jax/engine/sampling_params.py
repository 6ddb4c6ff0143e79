"""Sampling parameters of a sample, and batches in which every row has its own parameters.

`SamplingParams` is a small pytree whose numbers are leaves. Parameters with the same types and
static fields are of one variant. Parameters of one variant are stacked, so rows that differ in
weight, temperature or top-p share one computation. Each further variant in a batch is computed for
all rows, and each row uses the result of its own variant.
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

# Default for the maximum number of tokens of a generated text.
MAX_TOKENS = 32

_GUIDANCES = {kind.__name__: kind for kind in (Plain, ClassifierFree, TwoConditions, Contrastive)}
_SAMPLERS = {kind.__name__: kind for kind in (Greedy, Categorical)}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("guidance", "image", "text", "guidance_start", "guidance_stop"),
    meta_fields=(),
    # It only determines the grammar of a request, so the compiled programs do not need it.
    drop_fields=("max_tokens",),
)
@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """The parameters with which the ids of one sample are chosen.

    Attributes:
      guidance: combines the logits of the streams for the ids of images. Texts use stream 0 alone.
      image, text: samplers of the ids of images and of texts.
      guidance_start, guidance_stop: the range of guided ids among the generated ids of an image,
        counted from 0, without `guidance_stop`; 0 <= start <= stop. The others are sampled from
        stream 0. If no row of a batch has a guided id left, the other streams are not computed. A
        start above 0 saves no time, because the other streams also read the ids before it.
      max_tokens: maximum number of tokens of each generated text, 1 or more.
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
        """Returns classifier-free guidance for images, and one sampler for images and texts.

        Args:
          guidance: the weight, 0 or more; 1 is no guidance.
          temperature, top_p, top_k: see `leon_jax.engine.samplers.make_sampler`.
          max_tokens: maximum number of tokens of each generated text, 1 or more.

        Raises:
          UserError: a number is out of range.
        """
        sampler = make_sampler(temperature, top_p, top_k)
        params = cls(make_guidance(guidance), sampler, sampler, max_tokens=max_tokens)
        params.check()
        return params

    def replace(
        self,
        *,
        guidance: float | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
    ) -> "SamplingParams":
        """Returns these parameters with other values; None keeps a value.

        A new `temperature`, `top_p` or `top_k` applies to images and texts. The other two are then
        those of the image sampler.

        Args:
          guidance: the weight of classifier-free guidance, 0 or more; 1 is no guidance.
          temperature, top_p, top_k: see `leon_jax.engine.samplers.make_sampler`.

        Raises:
          UserError: a number is out of range.
        """
        params = self
        if guidance is not None:
            params = dataclasses.replace(params, guidance=make_guidance(guidance))
        if (temperature, top_p, top_k) != (None, None, None):
            values: dict[str, Any] = {"temperature": 0.0}  # of any other sampler than `Categorical`
            if isinstance(self.image, Categorical):
                values = dataclasses.asdict(self.image)
            new = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
            sampler = make_sampler(
                **values | {name: value for name, value in new.items() if value is not None}
            )
            params = dataclasses.replace(params, image=sampler, text=sampler)
        params.check()
        return params

    def check(self) -> None:
        """Checks all parameters, because compiled programs cannot check them.

        Raises:
          UserError: a number is out of range, `guidance` is not a `Guidance`, or a sampler is not
            callable.
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
        """Returns values for JSON, which `from_dict` reads.

        Guidance and samplers are `{"type": class name, field: value, ...}`.
        """
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("guidance", "image", "text"):
            part: Any = values[name]
            values[name] = {"type": type(part).__name__} | dataclasses.asdict(part)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SamplingParams":
        """Creates sampling parameters from the result of `to_dict`.

        Args:
          values: values by field name. Missing fields have their defaults.

        Raises:
          UserError: a key or a type is unknown, a value is not a number, or a number is out of
            range.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(names)):
            raise UserError(f"sampling.{unknown[0]} is unknown; its keys are {', '.join(names)}")
        parsed = dict(values)
        for name in parsed:
            if name not in ("guidance", "image", "text"):
                _check_number(f"sampling.{name}", parsed[name])
            else:
                types = _GUIDANCES if name == "guidance" else _SAMPLERS
                parsed[name] = _parse(f"sampling.{name}", parsed[name], types)
        params = cls(**parsed)
        params.check()
        return params


def _parse(key: str, values: Any, types: Mapping[str, type]) -> Any:
    """Creates an object of one of the types from `{"type": name, field: value, ...}`.

    Args:
      key: name of the object in error messages.
      values: the parsed JSON.
      types: the known types by name.

    Raises:
      UserError: the type or a field is unknown, or a field is neither a number nor None.
    """
    known = ", ".join(types)
    if not isinstance(values, Mapping) or values.get("type") not in types:
        raise UserError(f'{key} is {values!r}; it must be {{"type": ...}} with one of {known}')
    fields = {name: value for name, value in values.items() if name != "type"}
    for name, value in fields.items():
        if value is not None:
            _check_number(f"{key}.{name}", value)
    try:
        return types[values["type"]](**fields)
    except TypeError as error:
        raise UserError(f"{key} is {values!r}; {values['type']} has no such field") from error


def _check_number(key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{key} is {value!r}; it must be a number")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BatchedParams:
    """The sampling parameters of all rows.

    Attributes:
      variants: one `SamplingParams` for each variant; every leaf is float32[group, sample].
      variant_ids: int32[group, sample], the index of each row's variant.
    """

    variants: tuple[SamplingParams, ...]
    variant_ids: Int[Array, "group sample"]

    @classmethod
    def of(
        cls, params: Sequence[Sequence[SamplingParams]], variants: Sequence[SamplingParams]
    ) -> "BatchedParams":
        """Stacks the parameters of all rows in NumPy arrays.

        Args:
          params: parameters by [group][sample], each of one of the variants.
          variants: one example of each variant.
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
        """Returns whether each row still has a guided image id to generate.

        Args:
          used: number of generated ids of the row's current image; 2**30 if the row is not inside
            an image.
          has_later_image: True if another image comes after the row's current span.
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
        """Samples an image id for each row.

        Args:
          logits: logits of the image ids in all streams.
          used: number of generated ids of the row's current image.
          keys: random keys.

        Returns:
          int32 indices into the last axis of `logits`, and whether each can be used (see
          `_sample`).
        """

        def sample(variant: SamplingParams, logits, used, key):
            rows = logits[:, None]
            merged = variant.guidance(rows[: variant.guidance.streams])
            is_guided = (used >= variant.guidance_start) & (used < variant.guidance_stop)
            return _sample(variant.image, jnp.where(is_guided, merged, rows[0]), key[None])

        return self._per_variant(sample, 1, logits, used, keys)

    def sample_text(
        self, logits: Float[Array, "group sample ids"], keys: Key[Array, "group sample"]
    ) -> tuple[Int[Array, "group sample"], Bool[Array, "group sample"]]:
        """Samples an id of a text for each row.

        Args:
          logits: logits of all ids in stream 0; -inf for forbidden ids.
          keys: random keys.

        Returns:
          int32 ids, and whether each id can be used (see `_sample`).
        """

        def sample(variant: SamplingParams, logits, key):
            return _sample(variant.text, logits[None], key[None])

        return self._per_variant(sample, 0, logits, keys)

    def _per_variant(
        self, sample, axis: int, logits: Array, *others: Array
    ) -> tuple[Int[Array, "group sample"], Bool[Array, "group sample"]]:
        """Calls `sample` for each variant and row, and returns the results of the rows' variants.

        Args:
          sample: a function of a variant, and of the logits and the other arguments of one row.
          axis: the axis of groups in `logits`; the axis of samples follows it.
          logits: logits of all rows.
          others: other arguments of all rows, [group, sample].
        """
        axes = (0, axis, *[0] * len(others))
        rows = jax.vmap(jax.vmap(sample, axes), axes)
        ids, usable = rows(self.variants[0], logits, *others)
        for number, variant in enumerate(self.variants[1:], start=1):
            other_ids, other_usable = rows(variant, logits, *others)
            ids = jnp.where(self.variant_ids == number, other_ids, ids)
            usable = jnp.where(self.variant_ids == number, other_usable, usable)
        return ids.astype(jnp.int32), usable


def distinct_variants(params: Sequence[SamplingParams]) -> tuple[SamplingParams, ...]:
    """Returns one example of each variant. The order of variants does not depend on `params`."""
    examples: dict[tuple[str, ...], SamplingParams] = {}
    for each in params:
        examples.setdefault(variant_key(each), each)
    return tuple(examples[key] for key in sorted(examples))


def variant_key(params: SamplingParams) -> tuple[str, ...]:
    """Returns a key that is the same for two parameters only if they are of one variant.

    The key includes the types, because JAX regards the structures of two types as equal if their
    fields are alike.
    """
    parts = params.guidance, params.image, params.text
    types = [f"{type(part).__module__}.{type(part).__qualname__}" for part in parts]
    return str(jax.tree.structure(params)), *types


def _sample(
    sampler: Sampler, logits: Float[Array, "1 ids"], keys: Key[Array, "1"]
) -> tuple[Int[Array, ""], Bool[Array, ""]]:
    """Samples one id, and returns whether it can be used.

    An id can be used if it is in range and its logit is neither NaN nor -inf. A sampler may return
    other ids, and then the clipped id is returned with False.
    """
    logits = drop_bad_logits(logits)
    (chosen,) = sampler(logits, keys)
    in_range = (chosen >= 0) & (chosen < logits.shape[-1])
    chosen = jnp.clip(chosen, 0, logits.shape[-1] - 1)
    return chosen, in_range & (logits[0, chosen] > -jnp.inf)


def _stack(leaves: Sequence[float], shape: tuple[int, int]) -> np.ndarray:
    return np.array(leaves, np.float32).reshape(shape)
