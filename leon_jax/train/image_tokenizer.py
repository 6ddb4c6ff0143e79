"""Trains the image tokenizer: reconstruction, perceptual, codebook and adversarial losses.

The losses and their weights are those of taming-transformers (Esser et al. 2021, arXiv 2012.09841):
L1 + LPIPS + hinge PatchGAN. The adversarial loss starts late. Its weight makes its gradient at the
decoder's last layer as large as that of the reconstruction loss.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Literal

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from leon_jax import config as configs
from leon_jax import weight_files
from leon_jax.config import UserError
from leon_jax.data.augment import CropConfig, random_crop
from leon_jax.data.config import ImageDataConfig
from leon_jax.data.scenes import MAX_IMAGES, MIN_IMAGES, compose
from leon_jax.models.discriminator import PatchDiscriminator, hinge_loss
from leon_jax.models.perceptual import Network, lpips
from leon_jax.models.vqgan import VQGAN, VQGANConfig, quantize
from leon_jax.tokenizers.image import fit_image, normalize, to_pixels
from leon_jax.train import document_data, optimizer, perceptual_weights
from leon_jax.train.document_data import Component
from leon_jax.train.evaluation import Evaluation
from leon_jax.train.state import TrainState, check_multiples, rows_of_shard

# Images above and below each other in a sample.
_SAMPLES = 16


@dataclasses.dataclass(frozen=True)
class TokenizerLosses:
    """Weights and settings of the losses.

    Attributes:
      perceptual: weight of LPIPS; L1 has weight 1.
      network: the network whose features LPIPS compares.
      commitment: weight of the commitment term, relative to the codebook term.
      codebook: weight of the codebook and commitment terms together.
      adversarial: factor of the adaptive weight of the adversarial loss.
      adversarial_start: first step with the discriminator.
      discriminator_channels, discriminator_layers: the discriminator's shape.
      revive_after: number of steps after which an unused code is moved to a latent.
    """

    perceptual: float = 1.0
    network: Literal["alexnet", "vgg16"] = "vgg16"
    commitment: float = 0.25
    codebook: float = 1.0
    adversarial: float = 0.8
    adversarial_start: int = 10_000
    discriminator_channels: int = 64
    discriminator_layers: int = 3
    revive_after: int = 100


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Configuration of `TokenizerProgram`; see `leon_jax.train.decoder_config` for shared keys."""

    model: VQGANConfig
    losses: TokenizerLosses
    optimizer: optimizer.OptimizerConfig
    data: ImageDataConfig
    batch_size: int
    steps: int
    kind: Literal["tokenizer"] = "tokenizer"
    seed: int = 0
    augment: CropConfig = dataclasses.field(default_factory=CropConfig)


class AdversarialPair(nnx.Module):
    """The tokenizer (generator) and its discriminator."""

    def __init__(self, config: TokenizerConfig, *, rngs: nnx.Rngs) -> None:
        self.generator = VQGAN(config.model, rngs=rngs)
        self.discriminator = PatchDiscriminator(
            config.losses.discriminator_channels, config.losses.discriminator_layers, rngs=rngs
        )


class TokenizerProgram:
    """The training program of the image tokenizer; see `leon_jax.train.state.Program`."""

    kind = "tokenizer"
    flops_per_token = 0.0

    def __init__(self, config: TokenizerConfig) -> None:
        self.config = config
        if config.model.code_logits:
            raise UserError(
                "config.model.code_logits is True; it must be False, because a tokenizer of the "
                "Gumbel softmax can be used but not trained"
            )
        if config.optimizer.average:
            raise UserError(
                f"config.optimizer.average is {config.optimizer.average}; it must be 0 for an "
                "image tokenizer, whose codebook is revived and not averaged"
            )
        self.optimizer = optimizer.make(config.optimizer)
        network: Network = config.losses.network
        self.perceptual = jax.tree.map(np.asarray, perceptual_weights.load(network))

    def check_mesh(self, mesh: Sequence[int]) -> None:
        """Checks that a mesh splits the batch evenly. The weights are not split."""
        data, fsdp, *_ = mesh
        check_multiples([("config.batch_size", self.config.batch_size, data * fsdp, "data x fsdp")])

    def init(self, key: jax.Array) -> TrainState:
        """Returns randomly initialised networks with their optimizer states.

        Raises:
          UserError: the current mesh cannot split the batch evenly.
        """
        self.check_mesh(tuple(jax.sharding.get_abstract_mesh().shape.values()))
        pair = AdversarialPair(self.config, rngs=nnx.Rngs(key))
        opt_state = {
            "generator": self.optimizer.init(pair.generator),
            "discriminator": self.optimizer.init(pair.discriminator),
            # Steps since each code was last used. All start as unused, so that the first batch
            # initialises the codebook.
            "idle": jnp.full(
                (self.config.model.codes,), self.config.losses.revive_after, jnp.int32
            ),
        }
        return TrainState(jnp.int32(0), pair, opt_state, key)

    def step(
        self, state: TrainState, batch: dict[str, Array]
    ) -> tuple[TrainState, dict[str, Array]]:
        """Updates both networks once; `batch` is {"images": uint8[b, h, w, 3]}."""
        losses, images = self.config.losses, batch["images"].astype(jnp.float32) / 127.5 - 1
        generator, discriminator = state.model.generator, state.model.discriminator
        generator, idle, revived = self._revive(generator, state, images)

        def forward(generator: VQGAN):
            vectors, codebook_loss, codes = quantize(
                generator.latents(images), generator.vectors(), losses.commitment
            )
            features = generator.decoder.features(generator.from_code(vectors))
            return (generator.decoder.pixels(features), codebook_loss), (features, codes)

        # The losses' gradients are computed at the output image and weighted there, so that one
        # backward pass through the tokenizer is enough.
        (outputs, codebook_loss), backward, (features, codes) = jax.vjp(
            forward, generator, has_aux=True
        )
        (reconstruction, parts), reconstruction_grad = jax.value_and_grad(
            self._reconstruction_loss, has_aux=True
        )(outputs, images)

        def with_discriminator(_):
            def generator_loss(outputs):
                return -discriminator(outputs).mean()

            def discriminator_loss(discriminator):
                real, fake = discriminator(images), discriminator(outputs)
                return hinge_loss(real, fake), (real.mean(), fake.mean())

            loss, grad = jax.value_and_grad(generator_loss)(outputs)
            weight = losses.adversarial * _adaptive_weight(
                generator, features, reconstruction_grad, grad
            )
            (hinge, scores), discriminator_grads = jax.value_and_grad(
                discriminator_loss, has_aux=True
            )(discriminator)
            return weight * grad, discriminator_grads, (loss, hinge, weight, *scores)

        def without_discriminator(_):
            zero = jnp.float32(0)
            return (
                jnp.zeros_like(outputs),
                jax.tree.map(jnp.zeros_like, discriminator),
                (zero,) * 5,
            )

        is_adversarial = state.step >= losses.adversarial_start
        adversarial_grad, discriminator_grads, scores = jax.lax.cond(
            is_adversarial, with_discriminator, without_discriminator, None
        )
        (grads,) = backward((reconstruction_grad + adversarial_grad, jnp.float32(losses.codebook)))

        updates, generator_state = self.optimizer.update(
            grads, state.opt_state["generator"], generator
        )
        generator = optax.apply_updates(generator, updates)
        updates, discriminator_state = self.optimizer.update(
            discriminator_grads, state.opt_state["discriminator"], discriminator
        )
        # Weight decay must not change the discriminator before `adversarial_start`.
        updates = jax.tree.map(lambda update: jnp.where(is_adversarial, update, 0), updates)
        discriminator = optax.apply_updates(discriminator, updates)

        replicated_codes = codes.reshape(-1, out_sharding=jax.P(None))
        is_used = jnp.zeros(idle.shape, bool).at[replicated_codes].set(True)
        idle = jnp.where(is_used, 0, idle + 1)
        metrics = {
            "loss": reconstruction + losses.codebook * codebook_loss,
            "l1": parts[0],
            "lpips": parts[1],
            "psnr_db": parts[2],
            "codebook_loss": codebook_loss,
            "codes_used": (idle < losses.revive_after).mean(),
            "codes_revived": revived,
            "generator_gan_loss": scores[0],
            "discriminator_loss": scores[1],
            "adaptive_weight": scores[2],
            "score_real": scores[3],
            "score_fake": scores[4],
            "gradient_norm": optax.tree.norm((grads, discriminator_grads)),
            "learning_rate": optimizer.learning_rate(self.config.optimizer)(state.step),
            "pictures": jnp.float32(images.shape[0]),
        }
        state = dataclasses.replace(
            state,
            step=state.step + 1,
            model=_pair(state.model, generator, discriminator),
            opt_state={
                "generator": generator_state,
                "discriminator": discriminator_state,
                "idle": idle,
            },
        )
        return state, metrics

    def _reconstruction_loss(
        self, outputs: Float[Array, "b h w 3"], images: Float[Array, "b h w 3"]
    ) -> tuple[Float[Array, ""], tuple[Float[Array, ""], ...]]:
        l1 = jnp.abs(outputs - images).mean()
        perceptual, psnr = (values.mean() for values in self._image_quality(outputs, images))
        return l1 + self.config.losses.perceptual * perceptual, (l1, perceptual, psnr)

    def _image_quality(
        self, outputs: Float[Array, "b h w 3"], images: Float[Array, "b h w 3"]
    ) -> tuple[Float[Array, "b"], Float[Array, "b"]]:
        """Returns the LPIPS distance and the PSNR in dB of each image."""
        weights = jax.tree.map(jnp.asarray, self.perceptual)
        perceptual = lpips(outputs, images, weights, self.config.losses.network)
        error = jnp.square((jnp.clip(outputs, -1, 1) - images) / 2).mean((1, 2, 3))
        return perceptual, -10 * jnp.log10(error + 1e-10)

    def _revive(
        self, generator: VQGAN, state: TrainState, images: Float[Array, "b h w 3"]
    ) -> tuple[VQGAN, Int[Array, "k"], Float[Array, ""]]:
        """Replaces unused codes by random latents of this batch, so that all codes stay in use.

        Returns:
          The generator, the steps since each code was last used, and the number of revived codes.
        """
        idle = state.opt_state["idle"]
        is_dead = idle >= self.config.losses.revive_after

        def replace(generator: VQGAN) -> VQGAN:
            latents = generator.latents(images)
            rows = latents.reshape(-1, latents.shape[-1], out_sharding=jax.P(None, None))
            indices = jax.random.randint(state.step_key(), is_dead.shape, 0, rows.shape[0])
            codebook = jnp.where(is_dead[:, None], rows[indices], generator.codebook[...])
            leaves, structure = jax.tree.flatten(generator)
            old = generator.codebook[...]
            return jax.tree.unflatten(
                structure, [codebook if leaf is old else leaf for leaf in leaves]
            )

        generator = jax.lax.cond(is_dead.any(), replace, lambda generator: generator, generator)
        return generator, jnp.where(is_dead, 0, idle), is_dead.sum().astype(jnp.float32)

    def batches(self, shard: int = 0, shards: int = 1) -> grain.IterDataset:
        """Returns endless shuffled batches of random crops and scenes, or one shard of them.

        A batch is {"images": uint8[rows, resolution, resolution, 3]}.

        Raises:
          UserError: a folder is missing or damaged, or has fewer images than a batch.
        """
        config = self.config
        rows = rows_of_shard(config.batch_size, shards)
        components = document_data.open_components(config.data)
        lengths = [len(component.source) for component in components]
        document_data.check_batch_size(config.batch_size, 1, sum(lengths), "images")
        return document_data.batches(
            components,
            lengths,
            [RandomCrop(part, config.model.resolution, config.augment) for part in components],
            rows=rows,
            seed=config.seed,
            shard=(shard, shards),
            threads=config.data.threads,
        )

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shape and dtype of a batch of images."""
        side = self.config.model.resolution
        shape = self.config.batch_size, side, side, 3
        return {"images": jax.ShapeDtypeStruct(shape, jnp.uint8)}

    def evaluation(self) -> Evaluation | None:
        """Prepares the evaluation: whole images, cropped to squares in the middle.

        The metrics are `psnr_db`, `lpips`, `codes_used` (share of the codebook that all images
        together use) and `reconstruction_loss` (L1 + weight x LPIPS). The lowest
        `reconstruction_loss` is that of the best model.

        Returns:
          The evaluation; None: no folder has held-out documents.

        Raises:
          UserError: see `evaluation.choose_held_out`; or a document has no image.
        """
        documents, description = document_data.held_out_documents(self.config.data)
        if not documents:
            return None
        model, weight = self.config.model, self.config.losses.perceptual
        images = [
            fit_image(component.images(component.source[i], i)[0], model.resolution)
            for component, i in documents
        ]

        def metrics(outputs: Mapping[str, np.ndarray]) -> dict[str, float]:
            l1, perceptual, psnr = (
                outputs[name].mean(dtype=np.float64) for name in ("l1", "lpips", "psnr_db")
            )
            return {
                "reconstruction_loss": l1 + weight * perceptual,
                "psnr_db": psnr,
                "lpips": perceptual,
                "codes_used": len(np.unique(outputs["codes"])) / model.codes,
            }

        return Evaluation(
            description,
            {"images": np.stack(images)},
            self.config.batch_size,
            self.evaluate,
            metrics,
            "reconstruction_loss",
        )

    def evaluate(self, model: AdversarialPair, batch: dict[str, Array]) -> dict[str, Array]:
        """Returns the codes of each image, and the distances of its reconstruction."""
        images = batch["images"].astype(jnp.float32) / 127.5 - 1
        codes = model.generator.encode(images)
        outputs = model.generator.decode(codes)
        perceptual, psnr = self._image_quality(outputs, images)
        l1 = jnp.abs(outputs - images).mean((1, 2, 3))
        return {"l1": l1, "lpips": perceptual, "psnr_db": psnr, "codes": codes}

    def samples(self, state: TrainState) -> dict[str, np.ndarray]:
        """Returns up to sixteen images above their reconstructions.

        They are the first images of a held-out split, or of the training data if no folder has one.
        """
        components = document_data.open_components(self.config.data)
        component = document_data.sample_component(components)
        squares = [
            fit_image(component.images(component.source[i], i)[0], self.config.model.resolution)
            for i in range(min(_SAMPLES, len(component.source)))
        ]
        pixels = np.stack(squares)
        outputs = _reconstruct(state.model.generator, normalize(pixels))
        rows = [np.concatenate(list(row), axis=1) for row in (pixels, to_pixels(outputs))]
        return {"reconstructions": np.concatenate(rows, axis=0)}

    def export(self, state: TrainState, directory: pathlib.Path) -> None:
        """Writes `tokenizer.safetensors` in bfloat16."""
        weight_files.save(
            directory / "tokenizer.safetensors",
            state.model.generator,
            "tokenizer",
            configs.to_dict(self.config.model),
            jnp.bfloat16,
        )


class RandomCrop(grain.transforms.RandomMap):
    """Maps the index of a document to {"images": uint8[resolution, resolution, 3]}.

    It is a random crop of one of its images, chosen at random. With the probability
    `config.scenes` it is a scene instead, of this image and images of other documents of the
    component.
    """

    def __init__(self, component: Component, resolution: int, config: CropConfig) -> None:
        self.component, self.resolution, self.config = component, resolution, config

    def random_map(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        # Without scenes nothing is drawn for them, so that older runs resume with equal crops.
        if self.config.scenes and rng.random() < self.config.scenes:
            count = int(rng.integers(MIN_IMAGES, MAX_IMAGES + 1))
            others = rng.integers(len(self.component.source), size=count - 1)
            images = [self._image(row, rng) for row in (index, *others.tolist())]
            return {"images": compose(images, self.resolution, rng)}
        pixels = self._image(index, rng)
        return {"images": random_crop(pixels, self.resolution, self.config, rng)}

    def _image(self, row: int, rng: np.random.Generator) -> UInt8[np.ndarray, "h w 3"]:
        """Returns a random image of a document."""
        images = self.component.images(self.component.source[row], row)
        return images[int(rng.integers(len(images)))]


@jax.jit
def _reconstruct(generator: VQGAN, images: Float[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
    return generator.decode(generator.encode(images))


def _adaptive_weight(
    generator: VQGAN, features: Array, reconstruction_grad: Array, adversarial_grad: Array
) -> Float[Array, ""]:
    """Returns |d reconstruction / d kernel| / |d adversarial / d kernel| of the last layer.

    This is equation 7 of the paper. The arguments are gradients with respect to the output images.
    """
    decoder = generator.decoder

    def norm(cotangent: Array) -> Array:
        _, backward = jax.vjp(
            lambda kernel: decoder.pixels(features, kernel), decoder.out.kernel[...]
        )
        return jnp.linalg.norm(backward(cotangent)[0])

    ratio = norm(reconstruction_grad) / (norm(adversarial_grad) + 1e-4)
    return jax.lax.stop_gradient(jnp.clip(ratio, 0.0, 1e4))


def _pair(
    pair: AdversarialPair, generator: VQGAN, discriminator: PatchDiscriminator
) -> AdversarialPair:
    """Returns a new pair with the given parts; modules are pytrees, so nothing is mutated."""
    structure = jax.tree.structure(pair)
    # The attributes of a module's tree are in alphabetical order: discriminator, then generator.
    return jax.tree.unflatten(structure, jax.tree.leaves((discriminator, generator)))
