"""Tests the training step, the batches and the export of the image tokenizer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from leon_jax import weight_files
from leon_jax.config import UserError
from leon_jax.data.augment import CropConfig
from leon_jax.data.config import FolderComponent, ImageDataConfig
from leon_jax.documents import Document, Image, Provenance, Text
from leon_jax.models.vqgan import VQGANConfig
from leon_jax.tokenizers.image import fit_image
from leon_jax.train.image_tokenizer import (
    TokenizerConfig,
    TokenizerLosses,
    TokenizerProgram,
    _adaptive_weight,
)
from leon_jax.train.optimizer import OptimizerConfig
from leon_jax.train.state import TrainState
from tests import document_folders

CONFIG = TokenizerConfig(
    model=VQGANConfig(
        resolution=32, channels=8, multipliers=(1, 2), blocks=1, attention_sizes=(), groups=4,
        latent=8, code_dim=4, codes=64,
    ),
    losses=TokenizerLosses(
        network="alexnet", adversarial_start=20, discriminator_channels=4,
        discriminator_layers=1, revive_after=3,
    ),
    optimizer=OptimizerConfig(
        learning_rate=2e-3, total_steps=100, schedule="constant", weight_decay=0.0
    ),
    data=ImageDataConfig(),
    batch_size=4,
    steps=100,
)  # fmt: skip


@pytest.fixture(scope="module")
def batch():
    """Returns images of discs in four colours on white."""
    y, x = np.mgrid[:32, :32]
    inside = ((y - 16) ** 2 + (x - 16) ** 2 < 100)[..., None]
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (127, 127, 127)]
    return {"images": jnp.uint8(np.stack([np.where(inside, colour, 255) for colour in colours]))}


@pytest.fixture(scope="module")
def history(batch):
    """Trains 24 steps, the last 4 with the discriminator.

    Returns the program, the first state, the state after each step and the metrics of each step.
    """
    from leon_jax import sharding

    with jax.set_mesh(sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])):
        program = TokenizerProgram(CONFIG)
        first = state = jax.jit(program.init)(jax.random.key(0))
        step, metrics, states = jax.jit(program.step), [], []
        for _ in range(24):
            state, values = step(state, batch)
            metrics.append(jax.device_get(values))
            states.append(state)
    return program, first, states, metrics


@pytest.mark.slow
def test_reconstruction_improves(history):
    *_, metrics = history
    assert metrics[19]["loss"] < 0.7 * metrics[0]["loss"]
    assert metrics[19]["psnr_db"] > metrics[0]["psnr_db"] + 2


@pytest.mark.slow
def test_the_discriminator_does_not_change_before_its_start(history):
    _, first, states, metrics = history

    def discriminator(state):
        return jax.tree.leaves(state.model.discriminator)

    for before, after in zip(discriminator(first), discriminator(states[19]), strict=True):
        np.testing.assert_array_equal(before, after)
    assert metrics[19]["discriminator_loss"] == 0 < metrics[20]["discriminator_loss"]
    assert any(
        not np.array_equal(a, b)
        for a, b in zip(discriminator(states[19]), discriminator(states[23]), strict=True)
    )


@pytest.mark.slow
def test_unused_codes_are_revived(history):
    _, _, states, metrics = history
    assert metrics[0]["codes_revived"] == 64
    assert sum(values["codes_revived"] for values in metrics[1:]) > 0
    idle = np.asarray(states[-1].opt_state["idle"])
    assert idle.max() <= CONFIG.losses.revive_after


@pytest.mark.slow
def test_the_adaptive_weight_is_the_ratio_of_last_layer_gradients(history):
    _, _, states, _ = history
    generator = states[-1].model.generator
    rng = np.random.default_rng(0)
    features = jnp.float32(rng.normal(size=(2, 32, 32, 8)))
    reconstruction_grad, adversarial_grad = (
        jnp.float32(rng.normal(size=(2, 32, 32, 3))) * scale for scale in (3.0, 0.1)
    )

    def norm(cotangent):
        def inner(kernel):
            layer = jax.tree.map(lambda leaf: leaf, generator.decoder.out)
            leaves, structure = jax.tree.flatten(layer)
            leaves = [kernel if leaf.ndim == 4 else leaf for leaf in leaves]
            return (jax.tree.unflatten(structure, leaves)(features) * cotangent).sum()

        return jnp.linalg.norm(jax.grad(inner)(generator.decoder.out.kernel[...]))

    expected = norm(reconstruction_grad) / (norm(adversarial_grad) + 1e-4)
    weight = _adaptive_weight(generator, features, reconstruction_grad, adversarial_grad)
    np.testing.assert_allclose(weight, expected, rtol=1e-4)


@pytest.mark.slow
def test_the_exported_file_is_the_trained_generator(history, tmp_path):
    program, _, states, _ = history
    program.export(states[-1], tmp_path)
    arrays, config = weight_files.load(tmp_path / "tokenizer.safetensors", "tokenizer")
    assert config["codes"] == 64
    restored = weight_files.restore(states[-1].model.generator, arrays)
    np.testing.assert_allclose(
        restored.codebook[...], states[-1].model.generator.codebook[...], rtol=2**-8, atol=1e-6
    )


def program_of(*folders: str, batch_size: int = 4) -> TokenizerProgram:
    mixture = tuple(map(FolderComponent, folders))
    data = ImageDataConfig(folders[0]) if len(folders) == 1 else ImageDataConfig(mixture=mixture)
    return TokenizerProgram(dataclasses.replace(CONFIG, data=data, batch_size=batch_size))


def test_batches_are_random_square_crops_of_images_of_any_size(tmp_path):
    folder = document_folders.write(tmp_path / "drawings", document_folders.drawings())
    first, second = (next(iter(program_of(folder).batches())) for _ in range(2))
    assert first["images"].shape == (4, 32, 32, 3) and first["images"].dtype == np.uint8
    assert len({image.tobytes() for image in first["images"]}) == 4
    np.testing.assert_array_equal(first["images"], second["images"])
    shapes = program_of(folder).batch_shapes()
    assert {name: (array.shape, array.dtype) for name, array in first.items()} == {
        name: (shape.shape, shape.dtype) for name, shape in shapes.items()
    }


def test_a_batch_that_the_devices_cannot_share_is_refused():
    program = TokenizerProgram(CONFIG)
    program.check_mesh((2, 2, 1, 3))
    with pytest.raises(
        UserError, match=r"batch_size is 4; it must be a multiple of data x fsdp, 6"
    ):
        program.check_mesh((2, 3, 1, 1))


def test_scenes_show_documents_of_the_training_split_only(tmp_path):
    """Every document has one colour; those of the held-out split are grey."""
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), (0, 200, 200), (200, 0, 200)]
    documents, held_out = (
        [
            Document(
                (Text(str(colour)), Image(pixels=np.full((40, 40, 3), colour, np.uint8))),
                Provenance(f"{colour}", "colours", "CC0-1.0", ""),
            )
            for colour in some
        ]
        for some in (colours, [(90, 90, 90)] * 6)
    )
    folder = document_folders.write(tmp_path / "colours", documents, exam=held_out)
    program = program_of(folder)
    config = dataclasses.replace(program.config, augment=CropConfig(scenes=0.5))
    batches = iter(TokenizerProgram(config).batches())
    images = np.concatenate([next(batches)["images"] for _ in range(20)])
    shown = [{tuple(map(int, c)) for c in np.unique(i.reshape(-1, 3), axis=0)} for i in images]
    assert set().union(*shown) == {*colours, (255, 255, 255)}
    crops = sum((255, 255, 255) not in colours for colours in shown)
    assert 20 < crops < 60  # of 80 images, half
    # A scene may show a document twice.
    assert {len(colours) for colours in shown if len(colours) > 1} >= {3, 4, 5}


def test_batches_resume_exactly_from_a_saved_position(tmp_path):
    folders = [
        document_folders.write(tmp_path / name, documents)
        for name, documents in (
            ("drawings", document_folders.drawings()),
            ("photographs", document_folders.photographs(5, 40)),
        )
    ]
    iterator = iter(program_of(*folders).batches())
    for _ in range(3):
        next(iterator)
    state = iterator.get_state()
    expected = [next(iterator)["images"] for _ in range(3)]
    resumed = iter(program_of(*folders).batches())
    resumed.set_state(state)
    for images in expected:
        np.testing.assert_array_equal(next(resumed)["images"], images)


def test_samples_show_a_held_out_split_or_else_the_training_images(tmp_path):
    drawings, others = document_folders.drawings(), document_folders.photographs(3, 64)
    folder = document_folders.write(tmp_path / "a", drawings, exam=others)
    program = program_of(folder)
    state = TrainState(jnp.int32(0), program.init(jax.random.key(0)).model, None, None)
    image = program.samples(state)["reconstructions"]
    assert image.shape == (64, 3 * 32, 3)
    np.testing.assert_array_equal(image[:32, :32], fit_image(others[0].pixels, 32))
    without = program_of(document_folders.write(tmp_path / "b", drawings))
    image = without.samples(state)["reconstructions"]
    assert image.shape == (64, 12 * 32, 3)
    np.testing.assert_array_equal(image[:32, :32], fit_image(drawings[0].pixels, 32))


def test_too_few_images_for_a_batch_are_refused(tmp_path):
    folder = document_folders.write(tmp_path / "a", document_folders.drawings())
    with pytest.raises(
        UserError,
        match=r"batch_size is 16, which takes 16 images, but the training data has 12; set "
        r"config\.batch_size to at most 12, or train on at least 16 images",
    ):
        program_of(folder, batch_size=16).batches()
    with pytest.raises(UserError, match=r"config\.data\.folder is empty"):
        TokenizerProgram(CONFIG).batches()


def test_a_document_without_an_image_is_named(tmp_path):
    documents = [Document((Text("words"),), Provenance("k7", "s", "CC0-1.0", ""))] * 4
    folder = document_folders.write(tmp_path / "a", documents)
    with pytest.raises(UserError, match=r"document \d of .*a \(train\) \(k7\) has no stored image"):
        next(iter(program_of(folder).batches()))


def test_a_tokenizer_of_the_gumbel_softmax_is_not_trained():
    model = dataclasses.replace(CONFIG.model, code_logits=True)
    with pytest.raises(UserError, match=r"config\.model\.code_logits is True; it must be False"):
        TokenizerProgram(dataclasses.replace(CONFIG, model=model))


def test_an_average_of_the_weights_is_refused():
    optimizer = dataclasses.replace(CONFIG.optimizer, average=0.9)
    with pytest.raises(UserError, match=r"config\.optimizer\.average is 0.9; it must be 0"):
        TokenizerProgram(dataclasses.replace(CONFIG, optimizer=optimizer))
