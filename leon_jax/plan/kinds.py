"""What planning needs to know of each kind of model: its training step, work and choices."""

import abc
import dataclasses
import functools
import math
import pathlib
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from leon_jax import config as configs
from leon_jax import sharding
from leon_jax.config import UserError
from leon_jax.plan import products, roofline
from leon_jax.plan.products import Products
from leon_jax.plan.roofline import Work
from leon_jax.train import decoder_evaluation
from leon_jax.train.decoder import DecoderProgram
from leon_jax.train.decoder_config import DecoderTraining
from leon_jax.train.evaluation import rows_of_batch, with_gathered_outputs
from leon_jax.train.image_tokenizer import TokenizerConfig, TokenizerProgram
from leon_jax.train.retrieval_encoder import EncoderConfig, EncoderProgram
from leon_jax.train.state import Program, TrainState
from leon_jax.train.training_loop import skip_nonfinite


@dataclasses.dataclass(frozen=True)
class Setting:
    """Settings that do not change the model or the update.

    Attributes:
      mesh: sizes of the axes (data, fsdp, context, tensor), without -1.
      remat: what the backward pass recomputes, `config.model.remat`.
      microbatches: parts of a batch, of which one is in memory at a time.
    """

    mesh: tuple[int, ...]
    remat: str | bool
    microbatches: int = 1

    def changes(self, other: "Setting") -> str:
        """Returns the differences from another setting, as command-line flags."""
        flags = []
        if self.remat != other.remat:
            flags.append(f"--config.model.remat={self.remat}")
        if self.microbatches != other.microbatches:
            flags.append(f"--config.microbatches={self.microbatches}")
        if self.mesh != other.mesh:
            flags.append(f"--mesh={','.join(map(str, self.mesh))}")
        return " ".join(flags)


@dataclasses.dataclass(frozen=True)
class StepWork:
    """The work of a training step.

    Attributes:
      device: the least work of one device.
      needed_flops: operations of all devices without recomputation.
      executed_flops: operations of all devices with recomputation.
    """

    device: Work
    needed_flops: float
    executed_flops: float


@dataclasses.dataclass(frozen=True)
class TracedStep:
    """The training loop's step, traced for the current mesh.

    Attributes:
      state: the abstract state.
      batch: the abstract batch.
      traced: the step of both.
    """

    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    traced: jax.stages.Traced

    @classmethod
    def of(cls, program: Program) -> Self:
        """Traces the step of a program; call it under the mesh.

        Raises:
          UserError: the mesh cannot split the batch or the model evenly.
        """
        state = jax.eval_shape(program.init, jax.eval_shape(jax.random.key, 0))
        layout = sharding.batch_sharding()
        batch = {
            name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=layout)
            for name, array in program.batch_shapes().items()
        }
        step = jax.jit(skip_nonfinite(program.step), donate_argnums=0)
        return cls(state, batch, step.trace(state, batch))

    def evaluation(self, program: Program, largest: int, count: int) -> jax.stages.Traced:
        """Traces the evaluation of a program on held-out documents; call it under the mesh.

        Args:
          program: the program.
          largest: largest number of rows in a batch.
          count: number of rows of all documents.
        """
        rows = rows_of_batch(largest, count)
        batch = {
            name: jax.ShapeDtypeStruct(
                (rows, *array.shape[1:]), array.dtype, sharding=array.sharding
            )
            for name, array in self.batch.items()
        }
        return jax.jit(with_gathered_outputs(program.evaluate)).trace(self.state.model, batch)


class Kind(abc.ABC):
    """A training configuration as planning sees it.

    Attributes:
      config: the configuration, with the keys `model.remat`, `batch_size` and `steps`.
      unit: the name of what a step learns from, in figures: tokens, pictures or pairs.
      remat: values of `model.remat`, from the one that recomputes nothing to the one that stores
        least.
      microbatches: numbers of microbatches that a search tries.
      split_axes: mesh axes that split the model.
      evaluated_rows: largest number of rows of a document in an evaluation.
    """

    unit: ClassVar[str]
    remat: ClassVar[tuple[str | bool, ...]] = (False, True)
    microbatches: ClassVar[tuple[int, ...]] = (1,)
    split_axes: ClassVar[tuple[str, ...]] = ()
    evaluated_rows: ClassVar[int] = 1

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    @abc.abstractmethod
    def program(self) -> Program:
        """The training program."""

    @abc.abstractmethod
    def step_work(self, step: TracedStep, setting: Setting, state_bytes: float) -> StepWork:
        """Returns the work of a training step; call it under the mesh of the setting.

        Args:
          step: the traced step of this program.
          setting: the setting of this configuration.
          state_bytes: bytes of parameters and optimizer state on a device.
        """

    @property
    def units(self) -> int:
        """Number of units of a step."""
        return self.config.batch_size

    def setting(self, mesh: tuple[int, ...]) -> Setting:
        """Returns the setting of this configuration on a mesh."""
        return Setting(mesh, self.config.model.remat)

    def apply(self, setting: Setting) -> Self:
        """Returns this kind with another setting."""
        model = dataclasses.replace(self.config.model, remat=setting.remat)
        return type(self)(dataclasses.replace(self.config, model=model))

    def check(self, setting: Setting) -> None:
        """Checks that a setting splits the batch and the model evenly.

        Raises:
          UserError: it does not; the message names the key.
        """
        self.apply(setting).program.check_mesh(setting.mesh)


class DecoderKind(Kind):
    """The decoder. Its attention is a kernel, so its work is counted from its configuration."""

    unit = "tokens"
    remat = ("none", "dots_and_attention", "dots", "attention", "full")
    microbatches = (1, 2, 4, 8)
    split_axes = ("fsdp", "context", "tensor")
    # A row for each number of retrieved documents.
    evaluated_rows = decoder_evaluation.MAX_RETRIEVED + 1
    config: DecoderTraining

    @functools.cached_property
    def program(self) -> Program:
        return DecoderProgram(self.config)

    @property
    def units(self) -> int:
        return self.config.batch_size * self.config.data.length

    def setting(self, mesh: tuple[int, ...]) -> Setting:
        return Setting(mesh, self.config.model.remat, self.config.microbatches)

    def apply(self, setting: Setting) -> Self:
        config = super().apply(setting).config
        return type(self)(dataclasses.replace(config, microbatches=setting.microbatches))

    def step_work(self, step: TracedStep, setting: Setting, state_bytes: float) -> StepWork:
        del step
        model, length, tokens = self.config.model, self.config.data.length, self.units
        _, fsdp, _, tensor = setting.mesh
        work = roofline.training_work(
            model,
            length,
            tokens * tensor // math.prod(setting.mesh),
            state_bytes,
            fsdp,
            tensor,
            setting.microbatches,
            self.config.loss_chunk,
        )
        needed = model.flops_per_token(length) * tokens
        return StepWork(work, needed, roofline.training_flops(model, length) * tokens)


class CountedKind(Kind):
    """A kind whose work is counted from its traced step."""

    def count(self, step: TracedStep) -> Products:
        """Counts the products of a step."""
        return products.count(step.traced.jaxpr.jaxpr)

    def step_work(self, step: TracedStep, setting: Setting, state_bytes: float) -> StepWork:
        executed = needed = self.count(step)
        if setting.remat:
            plain = self.apply(dataclasses.replace(setting, remat=False))
            needed = plain.count(TracedStep.of(plain.program))
        # The optimizer reads and writes its state, and reads gradients as large as the parameters
        # (a third). The products write the gradients.
        traffic = state_bytes * (2 + 1 / 3) + executed.device_bytes
        return StepWork(Work(executed.device_flops, traffic), needed.flops, executed.flops)


class TokenizerKind(CountedKind):
    """The image tokenizer. All devices hold all of its weights."""

    unit = "pictures"
    config: TokenizerConfig

    @functools.cached_property
    def program(self) -> Program:
        return TokenizerProgram(self.config)

    def count(self, step: TracedStep) -> Products:
        """Counts the products of a step that trains the discriminator and revives no codes."""
        # A step that revives codes encodes its images once more. Few steps do.
        images = step.batch["images"].update(dtype=jnp.float32)
        latents = jax.jit(lambda generator, images: generator.latents(images))
        encoding = latents.trace(step.state.model.generator, images)
        return super().count(step) - products.count(encoding.jaxpr.jaxpr)


class EncoderKind(CountedKind):
    """The retrieval encoder.

    Raises:
      UserError: the size of the vocabulary is not set and the text tokenizer is missing.
    """

    unit = "pairs"
    split_axes = ("fsdp", "tensor")
    config: EncoderConfig

    def __init__(self, config: EncoderConfig) -> None:
        if not config.model.text.vocab_size and not pathlib.Path(config.data.text).is_file():
            raise UserError(
                f"config.data.text is {config.data.text!r}, which is no file; name the text "
                "tokenizer, or set the size of the vocabulary, for example "
                "--config.model.text.vocab_size=49408"
            )
        # With the size of the vocabulary, so that the text tokenizer is read only once.
        super().__init__(EncoderProgram(config).config)

    @functools.cached_property
    def program(self) -> Program:
        return EncoderProgram(self.config)


def make(kind: str, values: dict[str, Any]) -> Kind:
    """Returns a kind with the configuration of these values.

    Args:
      kind: decoder, tokenizer or encoder.
      values: the values of the config file without `loop`.

    Raises:
      UserError: a value is invalid.
    """
    match kind:
        case "tokenizer":
            return TokenizerKind(configs.build(TokenizerConfig, values))
        case "encoder":
            return EncoderKind(configs.build(EncoderConfig, values))
        case _:
            return DecoderKind(configs.build(DecoderTraining, values))
