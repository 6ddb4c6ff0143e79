"""Model files: what is written is what is read, and what does not fit is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from leon_jax import model_files
from leon_jax.config import UserError


class Small(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (3, width)))
        self.blocks = nnx.List([nnx.Linear(width, 2, rngs=rngs) for _ in range(2)])


@pytest.fixture
def path(tmp_path):
    model_files.save(tmp_path / "a.safetensors", Small(4, rngs=nnx.Rngs(0)), "small", {"width": 4})
    return tmp_path / "a.safetensors"


def test_arrays_and_configuration_come_back(path):
    arrays, config = model_files.load(path, "small")
    assert config == {"width": 4}
    assert {"kernel", "blocks.0.kernel", "blocks.1.bias"} <= set(arrays)
    abstract = jax.eval_shape(lambda: Small(4, rngs=nnx.Rngs(1)))
    restored = model_files.restore(abstract, arrays)
    original = Small(4, rngs=nnx.Rngs(0))
    for name, value in model_files.flatten(original).items():
        np.testing.assert_array_equal(value, model_files.flatten(restored)[name])
    assert [file.name for file in path.parent.iterdir()] == ["a.safetensors"]


def test_bfloat16_storage_is_restored_to_the_modules_type(tmp_path):
    model = Small(4, rngs=nnx.Rngs(0))
    model_files.save(tmp_path / "b.safetensors", model, "small", {}, jnp.bfloat16)
    arrays, _ = model_files.load(tmp_path / "b.safetensors", "small")
    assert arrays["kernel"].dtype == jnp.bfloat16
    restored = model_files.restore(model, arrays)
    assert restored.kernel[...].dtype == jnp.float32
    np.testing.assert_allclose(restored.kernel[...], model.kernel[...], rtol=2**-8)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no small file at .*none\.safetensors"):
        model_files.load(tmp_path / "none.safetensors", "small")


@pytest.mark.parametrize("keep", [0, 7, 100])
def test_a_truncated_file_is_named(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"a\.safetensors is not a whole safetensors file$"):
        model_files.load(path, "small")


def test_another_kind_of_model_is_refused(path):
    with pytest.raises(UserError, match="holds small; a decoder file is needed"):
        model_files.load(path, "decoder")


def test_another_configuration_is_refused_by_the_first_difference(path):
    arrays, _ = model_files.load(path, "small")
    with pytest.raises(UserError, match=r"'blocks.0.kernel' has shape \(4, 2\)|'kernel' has shape"):
        model_files.restore(Small(5, rngs=nnx.Rngs(0)), arrays)
    arrays.pop("kernel")
    with pytest.raises(UserError, match="disagrees about 'kernel'"):
        model_files.restore(Small(4, rngs=nnx.Rngs(0)), arrays)
