"""Guidance, which combines the logits of a request's streams into the logits that are sampled.

The engine runs all streams of a request together and stacks their logits. Stream 0 is the
conditional one. Each class is a pytree with the weights as leaves, so the decode loop is not
compiled again for a new weight.
"""

import abc
import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from leon_jax.config import UserError

# The contents of a stream's prompt. "all": the whole document and the retrieved documents.
# "images": only the images of the document; a hole replaces each text. "nothing": a hole replaces
# each text and each image. All streams also read the ids that the row generates.
Condition = Literal["all", "images", "nothing"]

_LARGEST_WEIGHT = float(np.finfo(np.float32).max)


class Guidance(abc.ABC):
    """A function from the stacked logits of all streams to one set of logits for each row.

    Attributes:
      conditions: the contents of each stream's prompt; "all" for stream 0.
    """

    conditions: ClassVar[tuple[Condition, ...]]

    @property
    def streams(self) -> int:
        """Number of streams that the guidance uses."""
        return len(self.conditions)

    @abc.abstractmethod
    def __call__(self, logits: Float[Array, "streams batch vocab"]) -> Float[Array, "batch vocab"]:
        """Combines the logits of the streams, float[streams, batch, vocab], to float[batch, vocab].

        Args:
          logits: logits of the first `self.streams` streams.
        """

    @abc.abstractmethod
    def check(self) -> None:
        """Checks the parameters of the guidance.

        Raises:
          UserError: a parameter is out of range.
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
        """Does nothing, because there are no parameters."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClassifierFree(Guidance):
    """Classifier-free guidance (CM3Leon eq. 2): uncond + weight (cond - uncond).

    Stream 0 is conditional, stream 1 is unconditional.

    Attributes:
      weight: 0 or more, finite in float32. 1 is no guidance; 0 is the unconditional model.
    """

    weight: float = 3.0
    conditions: ClassVar[tuple[Condition, ...]] = ("all", "images")

    def __call__(self, logits: Float[Array, "streams batch vocab"]) -> Float[Array, "batch vocab"]:
        """Returns the guided logits, float[batch, vocab]."""
        conditional, unconditional = logits[0], logits[1]
        # This form of the formula gives `conditional` exactly, bit for bit, for weight 1.
        return conditional + (self.weight - 1) * (conditional - unconditional)

    def check(self) -> None:
        """Checks the weight; see `Guidance.check`."""
        _check_weight("guidance", self.weight)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TwoConditions(Guidance):
    """Guidance with one weight for images and one for texts (InstructPix2Pix, eq. 3).

        nothing + image_weight (images - nothing) + text_weight (all - images)

    The conditions of the streams are "all" (0), "images" (1) and "nothing" (2). If both weights are
    1, there is no guidance.

    Attributes:
      image_weight, text_weight: 0 or more, finite in float32.
    """

    image_weight: float = 1.5
    text_weight: float = 3.0
    conditions: ClassVar[tuple[Condition, ...]] = ("all", "images", "nothing")

    def __call__(self, logits: Float[Array, "streams batch vocab"]) -> Float[Array, "batch vocab"]:
        """Returns the guided logits, float[batch, vocab]."""
        everything, images, nothing = logits[0], logits[1], logits[2]
        # This form of the formula gives `everything` exactly, bit for bit, for weights of 1.
        return (
            everything
            + (self.text_weight - 1) * (everything - images)
            + (self.image_weight - 1) * (images - nothing)
        )

    def check(self) -> None:
        """Checks both weights; see `Guidance.check`."""
        _check_weight("image_guidance", self.image_weight)
        _check_weight("text_guidance", self.text_weight)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Contrastive(Guidance):
    """Contrastive decoding against the unconditional stream, CD-K (CM3Leon eq. 3).

    The score of an id is log p_cond - log p_uncond if p_cond >= alpha * (k-th largest p_cond),
    else -inf. With k = 1 this is the rule of Li et al. 2022.

    Attributes:
      alpha: smallest allowed ratio of p_cond to the k-th largest p_cond, above 0 and at most 1.
      k: rank of the reference probability, 1 or more. A rank above the number of ids means the
        last one.
    """

    alpha: float = 0.5
    k: int = dataclasses.field(default=8, metadata={"static": True})
    conditions: ClassVar[tuple[Condition, ...]] = ("all", "images")

    def __call__(self, logits: Float[Array, "streams batch vocab"]) -> Float[Array, "batch vocab"]:
        """Returns the scores, float[batch, vocab]; -inf for ids that are not plausible."""
        expert, amateur = jax.nn.log_softmax(logits, axis=-1)
        reference = jax.lax.top_k(expert, min(self.k, expert.shape[-1]))[0][:, -1:]
        plausible = expert >= reference + jnp.log(self.alpha)
        return jnp.where(plausible, expert - amateur, -jnp.inf)

    def check(self) -> None:
        """Checks `alpha` and `k`; see `Guidance.check`."""
        if not 0 < self.alpha <= 1:
            raise UserError(f"alpha is {self.alpha}; it must be above 0 and at most 1")
        if self.k < 1:
            raise UserError(f"k is {self.k}; it must be 1 or more")


def make_guidance(weight: float) -> Plain | ClassifierFree:
    """Returns classifier-free guidance; for weight 1 `Plain`, which needs only one stream.

    Args:
      weight: 0 or more, finite in float32.

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
