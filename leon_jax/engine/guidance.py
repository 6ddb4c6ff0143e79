"""Guidance merges the logits of a request's streams into the logits that are sampled.

The engine runs all streams of a request side by side and stacks their logits. Stream 0 is the
conditional one. Each class is a pytree, so a new weight does not compile the decode loop again.
"""

import abc
import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from leon_jax.config import UserError

# What the prompt of a stream contains: everything; its images but no texts and no retrieved
# documents; or neither, only the kinds of its parts. All streams read what the row generates.
Condition = Literal["all", "images", "nothing"]

_LARGEST_WEIGHT = float(np.finfo(np.float32).max)


class Guidance(abc.ABC):
    """Maps the stacked logits of all streams to one set of logits a row.

    Attributes:
      conditions: what the prompt of each stream contains; that of stream 0 contains all.
    """

    conditions: ClassVar[tuple[Condition, ...]]

    @property
    def streams(self) -> int:
        """The number of streams it reads."""
        return len(self.conditions)

    @abc.abstractmethod
    def __call__(self, logits: Float[Array, "streams batch vocab"]) -> Float[Array, "batch vocab"]:
        """Returns float[batch, vocab]."""

    @abc.abstractmethod
    def check(self) -> None:
        """Checks the weights.

        Raises:
          UserError: one is out of range.
        """


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plain(Guidance):
    """No guidance: the logits of stream 0."""

    conditions: ClassVar[tuple[Condition, ...]] = ("all",)

    def __call__(self, logits: Float[Array, "streams batch vocab"]) -> Float[Array, "batch vocab"]:
        """Returns the logits of stream 0."""
        return logits[0]

    def check(self) -> None:
        """Does nothing: there is no weight."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClassifierFree(Guidance):
    """Classifier-free guidance (CM3Leon eq. 2): uncond + weight (cond - uncond).

    Streams: 0 conditional, 1 unconditional. Weight 1 is no guidance, 0 is the unconditional model.
    """

    weight: float = 3.0
    conditions: ClassVar[tuple[Condition, ...]] = ("all", "images")

    def __call__(self, logits: Float[Array, "streams batch vocab"]) -> Float[Array, "batch vocab"]:
        """Returns float[batch, vocab]."""
        conditional, unconditional = logits[0], logits[1]
        # The same expression, arranged so that weight 1 gives `conditional` to the last bit.
        return conditional + (self.weight - 1) * (conditional - unconditional)

    def check(self) -> None:
        """See `Guidance.check`."""
        _check_weight("guidance", self.weight)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TwoConditions(Guidance):
    """Guidance by an image and a text with a weight each (InstructPix2Pix, eq. 3).

        nothing + image_weight (images - nothing) + text_weight (all - images)

    Streams: 0 all, 1 the images without the texts, 2 nothing. Weights of 1 and 1 are no guidance.
    """

    image_weight: float = 1.5
    text_weight: float = 3.0
    conditions: ClassVar[tuple[Condition, ...]] = ("all", "images", "nothing")

    def __call__(self, logits: Float[Array, "streams batch vocab"]) -> Float[Array, "batch vocab"]:
        """Returns float[batch, vocab]."""
        everything, images, nothing = logits[0], logits[1], logits[2]
        # Arranged so that weights of 1 give `everything` to the last bit.
        return (
            everything
            + (self.text_weight - 1) * (everything - images)
            + (self.image_weight - 1) * (images - nothing)
        )

    def check(self) -> None:
        """See `Guidance.check`."""
        _check_weight("image_guidance", self.image_weight)
        _check_weight("text_guidance", self.text_weight)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Contrastive(Guidance):
    """Contrastive decoding against the unconditional stream, CD-K (CM3Leon eq. 3).

    The score of an id is log p_cond - log p_uncond if p_cond >= alpha * (k-th largest p_cond),
    else -inf. With k = 1 this is the rule of Li et al. 2022.

    Attributes:
      alpha: in (0, 1]; how much less likely than the k-th id an id may be.
      k: rank of the reference probability.
    """

    alpha: float = 0.5
    k: int = dataclasses.field(default=8, metadata={"static": True})
    conditions: ClassVar[tuple[Condition, ...]] = ("all", "images")

    def __call__(self, logits: Float[Array, "streams batch vocab"]) -> Float[Array, "batch vocab"]:
        """Returns float[batch, vocab], -inf outside the plausible set."""
        expert, amateur = jax.nn.log_softmax(logits, axis=-1)
        reference = jax.lax.top_k(expert, min(self.k, expert.shape[-1]))[0][:, -1:]
        plausible = expert >= reference + jnp.log(self.alpha)
        return jnp.where(plausible, expert - amateur, -jnp.inf)

    def check(self) -> None:
        """See `Guidance.check`."""
        if not 0 < self.alpha <= 1:
            raise UserError(f"alpha is {self.alpha}; it must be above 0 and at most 1")
        if self.k < 1:
            raise UserError(f"k is {self.k}; it must be 1 or more")


def make_guidance(weight: float) -> Plain | ClassifierFree:
    """Classifier-free guidance of this weight; weight 1 is `Plain`, which needs one stream only.

    Raises:
      UserError: the weight is negative or not finite in float32.
    """
    guidance = ClassifierFree(float(weight))
    guidance.check()
    return Plain() if weight == 1 else guidance


def _check_weight(name: str, weight: float) -> None:
    if not 0 <= weight <= _LARGEST_WEIGHT:
        raise UserError(
            f"{name} is {weight}; it must be 0 or more (1 means no guidance) and finite in float32"
        )
