"""LPIPS with its pretrained weights."""

import io
import pickle

import jax.numpy as jnp
import numpy as np
import pytest

from leon_jax.config import UserError
from leon_jax.models.perceptual import lpips
from leon_jax.train import perceptual_weights


@pytest.fixture(scope="module", params=["alexnet", "vgg16"])
def network(request):
    weights = perceptual_weights.load(request.param)
    return request.param, {
        layer: {name: jnp.asarray(np.asarray(array)) for name, array in arrays.items()}
        for layer, arrays in weights.items()
    }


@pytest.fixture(scope="module")
def images():
    """Four discs of different colours and positions on white, 64 px, in [-1, 1]."""
    y, x = np.mgrid[:64, :64]
    images = []
    for number, colour in enumerate([(-1, 1, -1), (1, -1, -1), (-1, -1, 1), (0, 0, -1)]):
        inside = (y - 20 - 8 * number) ** 2 + (x - 44 + 8 * number) ** 2 < 200
        images.append(np.where(inside[..., None], colour, 1))
    return jnp.asarray(np.stack(images), jnp.float32)


def test_the_weights_are_the_published_ones(network):
    name, weights = network
    kernel = np.asarray(weights["Conv_0"]["kernel"])
    assert kernel.shape == ((11, 11, 3, 64) if name == "alexnet" else (3, 3, 3, 64))
    heads = [np.asarray(weights[f"NetLinLayer_{i}"]["kernel"]) for i in range(5)]
    # The official heads were trained with non-negative weights.
    assert all((head >= 0).all() and head.max() > 0 for head in heads)
    if name == "vgg16":
        # The first filter of torchvision's VGG16.
        first = [[-0.5537, 0.1427, 0.5290], [-0.5831, 0.3566, 0.7657], [-0.6902, -0.0480, 0.4841]]
        np.testing.assert_allclose(kernel[:, :, 0, 0], first, atol=1e-4)


def test_equal_images_have_distance_0_and_more_noise_has_a_larger_distance(network, images):
    name, weights = network
    noise = jnp.asarray(np.random.default_rng(0).normal(size=images.shape), jnp.float32)
    others = jnp.roll(images, 1, axis=0)

    def distance(a, b):
        return float(lpips(a, b, weights, name).mean())

    assert distance(images, images) == pytest.approx(0, abs=1e-6)
    weak = distance(images, images + 0.02 * noise)
    strong = distance(images, images + 0.2 * noise)
    assert 0 < weak < strong
    assert distance(images, others) > 0.2


def test_a_pickle_that_would_run_code_is_rejected(monkeypatch, tmp_path):
    class Trap:
        def __reduce__(self):
            return (eval, ("1 + 1",))

    file = io.BytesIO(pickle.dumps({"AlexNet_0": Trap()}))
    with pytest.raises(pickle.UnpicklingError, match="eval"):
        perceptual_weights._ArrayUnpickler(file).load()


def test_a_damaged_file_is_an_error_with_its_name(monkeypatch, tmp_path):
    class Spec:
        origin = str(tmp_path / "__init__.py")

    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "alexnet.ckpt").write_bytes(b"\x80\x03}q\x00")
    monkeypatch.setattr(perceptual_weights.importlib.util, "find_spec", lambda name: Spec)
    with pytest.raises(UserError, match=r"alexnet\.ckpt"):
        perceptual_weights.load("alexnet")
