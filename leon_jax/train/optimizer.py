"""The optimizer of all models: AdamW with warm-up, decay and clipping by global norm."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import optax

from leon_jax.weight_files import flatten


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Configuration of `make`.

    Attributes:
      learning_rate: the peak learning rate.
      total_steps: the step at which the decay ends.
      warmup_steps: steps of linear warm-up from 0.
      schedule: the decay after warm-up; `linear` and `cosine` end at `final_fraction` of the peak.
      final_fraction: final learning rate as a fraction of the peak; OPT's code uses 0.1.
      beta1, beta2, eps: Adam's constants; the defaults are OPT's.
      weight_decay: decoupled weight decay, applied only to arrays with two or more axes, and not
        to the scales and biases of the decoder.
      first_moment: dtype of Adam's first moment; bfloat16 saves 2 bytes per weight.
      clip_norm: maximum global L2 norm of the gradients; 0 disables clipping.
    """

    learning_rate: float
    total_steps: int
    warmup_steps: int = 0
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    final_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    first_moment: Literal["float32", "bfloat16"] = "float32"
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_steps <= self.total_steps:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps}; it must be between 0 and total_steps "
                f"({self.total_steps})"
            )


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """Returns the learning rate as a function of the step."""
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
    decay_steps = max(1, config.total_steps - config.warmup_steps)
    match config.schedule:
        case "constant":
            decay = optax.constant_schedule(peak)
        case "linear":
            decay = optax.linear_schedule(peak, final, decay_steps)
        case "cosine":
            decay = optax.cosine_decay_schedule(peak, decay_steps, alpha=config.final_fraction)
    if config.warmup_steps == 0:
        return decay
    warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
    return optax.join_schedules([warmup, decay], [config.warmup_steps])


def make(
    config: OptimizerConfig, decays: Callable[[str, Any], bool] | None = None
) -> optax.GradientTransformation:
    """Returns the optax transformation of a configuration.

    Args:
      config: the configuration.
      decays: returns whether an array decays, from its dotted path and the array; None: arrays with
        two or more axes do.
    """
    decays = decays or (lambda name, leaf: leaf.ndim >= 2)
    adamw = optax.adamw(
        learning_rate(config),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mu_dtype=config.first_moment,
        mask=lambda params: jax.tree.unflatten(
            jax.tree.structure(params),
            [decays(name, leaf) for name, leaf in flatten(params).items()],
        ),
    )
    if not config.clip_norm:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
