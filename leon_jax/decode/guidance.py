"""Guidance: how the logits of a prompt's streams become the logits that are sampled.

The engine runs all streams of a prompt side by side and stacks their logits; stream 0 is always
the conditional one. Each dataclass is a pytree, so a new weight does not compile the loop again.
"""

import abc
import dataclasses
import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from leon_jax.config import UserError

# What the prompt of a stream still says: all of it; its pictures, without texts and what was
# retrieved; or neither, only what it consists of. What the row writes itself, all streams read.
Condition = Literal["all", "pictures", "nothing"]


class Guidance(abc.ABC):
    """Maps stacked stream logits to one set of logits a row.

    Attributes:
      conditions: what the prompt of each stream that it reads says; stream 0 says all.
    """

    conditions: ClassVar[tuple[Condition, ...]]

    @property
    def streams(self) -> int:
        """How many streams it reads."""
        return len(self.conditions)

    @abc.abstractmethod
    def __call__(self, logits: Float[Array, "streams batch vocab"]) -> Float[Array, "batch vocab"]:
        """One set of logits a row."""

    @abc.abstractmethod
    def check(self) -> None:
        """Checks the numbers.

        Raises:
          UserError: one is out of range.
        """


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plain(Guidance):
    """One stream, as it is."""

    conditions: ClassVar[tuple[Condition, ...]] = ("all",)

    def __call__(self, logits: Float[Array, "streams batch vocab"]) -> Float[Array, "batch vocab"]:
        """Returns the logits of stream 0."""
        return logits[0]

    def check(self) -> None:
        """There is nothing to check."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClassifierFree(Guidance):
    """Classifier-free guidance (CM3Leon eq. 2): uncond + weight (cond - uncond).

    Streams: 0 conditional, 1 unconditional. Weight 1 is no guidance, 0 is the unconditional model.
    """

    weight: float = 3.0
    conditions: ClassVar[tuple[Condition, ...]] = ("all", "pictures")

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
    """Guidance by a picture and a text, each with a weight of its own (InstructPix2Pix, eq. 3).

        nothing + image_weight (pictures - nothing) + text_weight (all - pictures)

    Streams: 0 all, 1 the pictures without the texts, 2 nothing. Both weights 1 are no guidance.
    """

    image_weight: float = 1.5
    text_weight: float = 3.0
    conditions: ClassVar[tuple[Condition, ...]] = ("all", "pictures", "nothing")

    def __call__(self, logits: Float[Array, "streams batch vocab"]) -> Float[Array, "batch vocab"]:
        """Returns float[batch, vocab]."""
        everything, pictures, nothing = logits[0], logits[1], logits[2]
        # Arranged so that weights of 1 give `everything` to the last bit.
        return (
            everything
            + (self.text_weight - 1) * (everything - pictures)
            + (self.image_weight - 1) * (pictures - nothing)
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
    conditions: ClassVar[tuple[Condition, ...]] = ("all", "pictures")

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


def _check_weight(name: str, weight: float) -> None:
    if not math.isfinite(weight) or weight < 0:
        raise UserError(f"{name} is {weight}; it must be 0 or more (1 means no guidance)")


def make_two_conditions(image: float, text: float) -> Guidance:
    """Guidance of these weights by a picture and a text; 1 and 1 need one stream only.

    Raises:
      UserError: a weight is negative or not finite.
    """
    guidance = TwoConditions(float(image), float(text))
    guidance.check()
    return Plain() if image == text == 1 else guidance


def make_guidance(weight: float) -> Plain | ClassifierFree:
    """Guidance of this weight; weight 1 needs one stream only.

    Raises:
      UserError: the weight is negative or not finite.
    """
    guidance = ClassifierFree(float(weight))
    guidance.check()
    return Plain() if weight == 1 else guidance
