"""The optimizer of every model here: AdamW with warm-up, a decay, and clipping by global norm."""

import dataclasses
from typing import Literal

import jax
import optax


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Settings of `make`.

    Attributes:
      learning_rate: the peak.
      warmup_steps: steps of linear warm-up from 0.
      total_steps: where the decay ends.
      schedule: shape after warm-up; `linear` and `cosine` end at `final_fraction` of the peak.
      final_fraction: 0.1 is what OPT's code, the base of CM3Leon's, uses.
      beta1, beta2, eps: Adam's constants; OPT's by default.
      weight_decay: decoupled; applied to arrays of two or more axes only.
      first_moment: how Adam's mean of gradients is kept; bfloat16 saves 2 bytes a weight.
      clip_norm: gradients are scaled down to this global L2 norm; 0 turns clipping off.
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
    """The learning rate as a function of the step."""
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


def make(config: OptimizerConfig) -> optax.GradientTransformation:
    """The optax transformation of this configuration."""
    adamw = optax.adamw(
        learning_rate(config),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mu_dtype=config.first_moment,
        mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim >= 2, params),
    )
    if not config.clip_norm:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
