"""Tests counted products against XLA's cost analysis and against closed forms."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from leon_jax.models.clip import CLIPConfig, TextConfig, VisionConfig
from leon_jax.models.vqgan import VQGANConfig
from leon_jax.plan import products
from leon_jax.plan.kinds import EncoderKind, TokenizerKind, TracedStep
from leon_jax.plan.products import Products
from tests import simulated_devices
from tests.train import test_image_tokenizer, test_retrieval_encoder

ONE_DEVICE = (1, 1, 1, 1)


def count(function, *arguments) -> Products:
    return products.count(jax.jit(function).trace(*arguments).jaxpr.jaxpr)


def xla_flops(function, *arguments) -> float:
    return jax.jit(function).lower(*arguments).cost_analysis()["flops"]


def tokenizer(remat: bool = False) -> TokenizerKind:
    """Returns a tokenizer wide enough that its other operations hardly count."""
    config = test_image_tokenizer.CONFIG
    model = VQGANConfig(
        resolution=32, channels=32, multipliers=(1, 2), blocks=1, attention_sizes=(16,), groups=4,
        latent=32, code_dim=16, codes=64, remat=remat,
    )  # fmt: skip
    losses = dataclasses.replace(
        config.losses, discriminator_channels=32, discriminator_layers=2, network="vgg16"
    )
    return TokenizerKind(dataclasses.replace(config, model=model, losses=losses))


def encoder(layers: int = 1, remat: bool = False, stem: str = "patch") -> EncoderKind:
    """Returns an encoder; XLA counts a scan once, so only one layer can be compared with it."""
    model = CLIPConfig(
        VisionConfig(32, 8, 256, layers, 4, stem), TextConfig(16, 300, 256, layers, 4), 64,
        remat=remat,
    )  # fmt: skip
    config = test_retrieval_encoder.tiny("", "no text tokenizer is read")
    # With a large batch the optimizer's operations, which are not counted, hardly matter.
    return EncoderKind(dataclasses.replace(config, model=model, batch_size=32))


KINDS = {"tokenizer": tokenizer, "encoder": encoder}


def step_work(kind, state_bytes: float = 0.0):
    setting = kind.setting(ONE_DEVICE)
    return kind.step_work(TracedStep.of(kind.program), setting, state_bytes)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [
        (8, 3, 1, (1, 1)),
        (8, 3, 2, (0, 1)),
        (9, 4, 2, (1, 1)),
        (16, 11, 4, (2, 2)),
        (5, 1, 1, (0, 0)),
    ],
)
def test_convolutions_and_their_gradients_count_as_in_xla(size, kernel, stride, padding):
    """XLA, too, leaves out products with padding and with the gaps of dilated images."""
    images = jnp.ones((2, size, size, 5))
    weights = jnp.ones((kernel, kernel, 5, 7))

    def convolve(images, weights):
        return jax.lax.conv_general_dilated(
            images, weights, (stride, stride), (padding, padding),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip

    def gradients(images, weights):
        results, backward = jax.vjp(convolve, images, weights)
        return backward(results)

    forward, both = count(convolve, images, weights), count(gradients, images, weights)
    # XLA rounds: a count differs by some operations.
    assert forward.flops == pytest.approx(xla_flops(convolve, images, weights), rel=1e-3)
    assert both.flops == pytest.approx(xla_flops(gradients, images, weights), rel=1e-3)
    # Every product of the forward pass is in both gradients.
    assert both.flops == 3 * forward.flops > 0


def test_a_product_counts_its_operations_and_arrays():
    left, right = jnp.ones((3, 4, 5), jnp.bfloat16), jnp.ones((3, 5, 6), jnp.float32)
    counted = count(lambda a, b: jnp.einsum("bij,bjk->bik", a.astype(jnp.float32), b), left, right)
    size = 4 * (3 * 4 * 5 + 3 * 5 * 6 + 3 * 4 * 6)
    assert counted == Products(2 * 3 * 4 * 5 * 6, 2 * 3 * 4 * 5 * 6, size)


def test_a_scan_counts_its_iterations_and_a_conditional_its_longest_branch():
    weights = jnp.ones((5, 8, 8))

    def layers(x, weights):
        return jax.lax.scan(lambda x, weight: (x @ weight, None), x, weights)[0]

    def branches(x, weights):
        return jax.lax.cond(
            x.sum() > 0, lambda: x @ weights[0], lambda: x @ weights[0] @ weights[1]
        )

    x = jnp.ones((4, 8))
    product = count(jnp.matmul, x, weights[0])
    assert count(layers, x, weights) == product * 5
    assert count(branches, x, weights) == product * 2


def test_devices_share_the_products_whose_arrays_are_split_over_them():
    program = [sys.executable, "-m", "tests.plan.on_eight_devices"]
    environment = simulated_devices.environment()
    result = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    counts = {name: Products(**values) for name, values in json.loads(result.stdout).items()}
    flops, sizes = 2 * 16 * 8 * 6, (16 * 8 / 4, 8 * 6 / 4, 16 * 6 / 8)
    assert counts["split"] == Products(flops, flops / 8, 4 * sum(sizes))
    assert counts["repeated"] == Products(flops, flops, 4 * (16 * 8 + 8 * 6 + 16 * 6))
    # Every product of a step has the images of the batch, or their gradients.
    for name in KINDS:
        assert counts[name].device_flops == counts[name].flops / 8 > 0


@pytest.mark.parametrize("remat", [False, True])
def test_the_tokenizers_operations_agree_with_xlas_count(remat):
    """XLA, too, counts the longest branches: a step with discriminator that revives codes."""
    kind = tokenizer(remat)
    step = TracedStep.of(kind.program)
    xla = step.traced.lower().cost_analysis()["flops"]
    counted = products.count(step.traced.jaxpr.jaxpr).flops
    assert counted == pytest.approx(xla, rel=0.02) and counted < xla
    # Without the reviving of codes, the encoder runs once less.
    images = jnp.ones((4, 32, 32, 3))
    generator = jax.eval_shape(kind.program.init, jax.random.key(0)).model.generator
    encoding = xla_flops(lambda generator, images: generator.latents(images), generator, images)
    assert kind.count(step).flops == pytest.approx(xla - encoding, rel=0.02)


@pytest.mark.parametrize("stem", ["patch", "convolution"])
@pytest.mark.parametrize("remat", [False, True])
def test_the_encoders_operations_agree_with_xlas_count(remat, stem):
    step = TracedStep.of(encoder(remat=remat, stem=stem).program)
    xla = step.traced.lower().cost_analysis()["flops"]
    counted = products.count(step.traced.jaxpr.jaxpr).flops
    assert counted == pytest.approx(xla, rel=0.04) and counted < xla


def test_every_layer_of_the_encoder_counts():
    one, two, five = (step_work(encoder(layers)).needed_flops for layers in (1, 2, 5))
    assert five - one == 4 * (two - one) > 0


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_recomputation_is_executed_but_not_needed(make):
    """It repeats at most the forward pass, a third of the operations."""
    plain, remat = step_work(make()), step_work(make(remat=True))
    assert plain.needed_flops == plain.executed_flops == remat.needed_flops
    assert plain.needed_flops < remat.executed_flops < 4 / 3 * plain.needed_flops
    assert plain.device.hbm_bytes < remat.device.hbm_bytes


def test_the_optimizer_reads_and_writes_its_state_and_reads_gradients():
    kind = encoder()
    difference = step_work(kind, 3e9).device.hbm_bytes - step_work(kind).device.hbm_bytes
    assert difference == 2 * 3e9 + 1e9
