"""The optimizer of all models: AdamW or Muon with warm-up, decay and clipping by global norm.

It can also keep an average of the weights, which is part of its state.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int
from optax.contrib import MuonDimensionNumbers

from leon_jax.config import UserError
from leon_jax.train.state import TrainState
from leon_jax.weight_files import flatten

# Scales Muon's updates to the size of AdamW's, so that learning rate and weight decay may stay
# (Liu et al. 2025, arXiv 2502.16982, section 2.2).
_MUON_RMS = 0.2


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Configuration of `make`.

    Attributes:
      learning_rate: the peak learning rate.
      total_steps: the step at which the decay ends.
      warmup_steps: steps of linear warm-up from 0.
      schedule: the learning rate after warm-up. It is constant, or decays to `final_fraction` of
        the peak: from the end of the warm-up on (`linear`, `cosine`), or linearly in the last
        `decay_steps` steps (`wsd`: warm-up, stable, decay; Hu et al. 2024, arXiv 2404.06395).
      decay_steps: steps of the decay of `wsd`, at least 1; 0 for other schedules.
      final_fraction: final learning rate as a fraction of the peak; OPT's code uses 0.1.
      beta1, beta2, eps: Adam's constants; the defaults are OPT's.
      weight_decay: decoupled weight decay, applied only to arrays with two or more axes, and not
        to the scales and biases of the decoder.
      first_moment: dtype of Adam's first moment; bfloat16 saves 2 bytes per weight.
      clip_norm: maximum global L2 norm of the gradients; 0 disables clipping.
      kind: "adamw", or "muon", which updates the matrices of the decoder's layers with
        orthogonalised momentum (Jordan et al. 2024) of the rate `beta2`, and all other weights as
        AdamW with Nesterov momentum does.
      average: the rate of an exponential moving average of the weights, for example 0.999; 0: none.
        Samples and the export use the averaged weights. In step t the rate is at most
        (1 + t) / (10 + t), so that the average soon forgets the random weights.

    Raises:
      ValueError: a value is out of range.
    """

    learning_rate: float
    total_steps: int
    warmup_steps: int = 0
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "linear"
    final_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    first_moment: Literal["float32", "bfloat16"] = "float32"
    clip_norm: float = 1.0
    kind: Literal["adamw", "muon"] = "adamw"
    average: float = 0.0
    decay_steps: int = 0

    OMITTED_DEFAULTS: ClassVar[tuple[str, ...]] = ("kind", "average", "decay_steps")

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_steps <= self.total_steps:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps}; it must be between 0 and total_steps "
                f"({self.total_steps})"
            )
        stable_steps = self.total_steps - self.warmup_steps - self.decay_steps
        if self.schedule == "wsd" and (self.decay_steps < 1 or stable_steps < 0):
            raise ValueError(
                f"decay_steps is {self.decay_steps}; with the schedule wsd it must be at least 1 "
                f"and at most total_steps - warmup_steps, {self.total_steps - self.warmup_steps}"
            )
        if self.schedule != "wsd" and self.decay_steps:
            raise ValueError(
                f"decay_steps is {self.decay_steps}, but the schedule {self.schedule} has none; "
                "set it to 0, or schedule to wsd"
            )
        if not 0 <= self.average < 1:
            raise ValueError(f"average is {self.average}; it must be at least 0 and below 1")


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
        case "wsd":
            stable_steps = decay_steps - config.decay_steps
            decay = optax.linear_schedule(peak, final, config.decay_steps, stable_steps)
    if config.warmup_steps == 0:
        return decay
    warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
    return optax.join_schedules([warmup, decay], [config.warmup_steps])


def make(
    config: OptimizerConfig,
    decays: Callable[[str, Any], bool] | None = None,
    matrices: Mapping[str, MuonDimensionNumbers] | None = None,
) -> optax.GradientTransformation:
    """Returns the optax transformation of a configuration.

    Args:
      config: the configuration.
      decays: returns whether an array decays, from its dotted path and the array; None: arrays with
        two or more axes do.
      matrices: the arrays that Muon updates, by their dotted path, with the axes of their rows and
        columns; other axes are those of a stack of matrices.

    Raises:
      UserError: the kind is Muon, and there are no matrices.
    """
    decays = decays or (lambda name, leaf: leaf.ndim >= 2)

    def mask(params: Any) -> Any:
        return _map_with_names(decays, params)

    match config.kind:
        case "adamw":
            update = optax.adamw(
                learning_rate(config),
                b1=config.beta1,
                b2=config.beta2,
                eps=config.eps,
                weight_decay=config.weight_decay,
                mu_dtype=config.first_moment,
                mask=mask,
            )
        case "muon":
            if not matrices:
                raise UserError(
                    'config.optimizer.kind is "muon"; it is for decoders only, so set "adamw"'
                )
            muon = optax.contrib.muon(
                learning_rate(config),
                beta=config.beta2,
                eps=config.eps,
                weight_decay=config.weight_decay,
                weight_decay_mask=mask,
                mu_dtype=config.first_moment,
                adam_b1=config.beta1,
                adam_b2=config.beta2,
                adam_weight_decay=config.weight_decay,
                muon_weight_dimension_numbers=lambda params: _map_with_names(
                    lambda name, leaf: matrices.get(name), params
                ),
                consistent_rms=_MUON_RMS,
            )
            update = _sharded_by_the_compiler(muon)
    parts = [update]
    if config.clip_norm:
        parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
    if config.average:
        parts.append(_averaging(config.average))
    return optax.chain(*parts) if len(parts) > 1 else update


def averaged(state: TrainState) -> TrainState:
    """Returns the state with the averaged weights, or `state` if there is no average."""
    for part in jax.tree.leaves(state.opt_state, is_leaf=lambda part: isinstance(part, Average)):
        if isinstance(part, Average):
            return dataclasses.replace(state, model=part.weights)
    return state


class Average(NamedTuple):
    """The state of `_averaging`: number of updates, and the averaged weights."""

    updates: Int[Array, ""]
    weights: Any


def _averaging(rate: float) -> optax.GradientTransformation:
    """Returns a transformation that changes no update and averages the weights after it."""

    def init(params: Any) -> Average:
        return Average(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params))

    def update(updates: Any, state: Average, params: Any = None) -> tuple[Any, Average]:
        count = state.updates + 1
        step_rate = jnp.minimum(rate, (1 + count) / (10 + count))
        weights = jax.tree.map(
            lambda old, new: step_rate * old + (1 - step_rate) * new,
            state.weights,
            optax.apply_updates(params, updates),
        )
        return updates, Average(count, weights)

    return optax.GradientTransformation(init, update)


def _sharded_by_the_compiler(
    transformation: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """Returns the transformation; the compiler chooses the shardings inside its update.

    Muon multiplies sharded matrices and does not say how its products are sharded.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        # The new values are sharded as the old ones.
        shardings = jax.tree.map(lambda leaf: jax.typeof(leaf).sharding.spec, (updates, state))
        automatic = jax.sharding.auto_axes(transformation.update, out_sharding=shardings)
        return automatic(updates, state, params)

    return optax.GradientTransformation(transformation.init, update)


def _map_with_names(function: Callable[[str, Any], Any], params: Any) -> Any:
    """Returns `params` with `function(dotted path, array)` instead of each array."""
    return jax.tree.unflatten(
        jax.tree.structure(params),
        [function(name, leaf) for name, leaf in flatten(params).items()],
    )
