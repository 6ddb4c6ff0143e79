"""Weight files: round trips, equal bytes for equal contents, digests and the former format."""

import hashlib
import json
import os
import pathlib
import stat
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import nnx

from leon_jax import safetensors_format, weight_digests, weight_files
from leon_jax.config import UserError, build
from leon_jax.models.decoder import Decoder
from leon_jax.models.decoder_config import DecoderConfig

DECODER = DecoderConfig(vocab_size=48, max_length=16, layers=2, embed=32, heads=4, mlp=64)
SHIPPED = pathlib.Path(weight_files.__file__).parent / "weights" / "emoji" / "decoder.safetensors"


class Small(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (3, width)))
        self.blocks = nnx.List([nnx.Linear(width, 2, rngs=rngs) for _ in range(2)])


class Pair(nnx.Module):
    """Names as in the decoder: in the former format, one name is an array and a prefix."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.query = nnx.Param(jax.random.normal(rngs.params(), (4, 4)))
        self.value = nnx.Param(jax.random.normal(rngs.params(), (4, 5)))


class Outer(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.blocks = Pair(rngs=rngs)
        self.table = nnx.Param(jax.random.normal(rngs.params(), (3, 4)))


def save_former(path, module, kind="outer", config=None):
    """Writes a file of the format `leon_jax/1`, with the safetensors library."""
    arrays = {
        weight_files.former_name(name): np.asarray(array)
        for name, array in weight_files.flatten(module).items()
    }
    metadata = {"format": "leon_jax/1", "kind": kind, "config": json.dumps(config or {"a": 1})}
    path.write_bytes(safetensors.numpy.save(arrays, metadata))
    return path


@pytest.fixture
def path(tmp_path):
    weight_files.save(tmp_path / "a.safetensors", Small(4, rngs=nnx.Rngs(0)), "small", {"width": 4})
    return tmp_path / "a.safetensors"


@pytest.fixture
def outer():
    return Outer(rngs=nnx.Rngs(0))


@pytest.fixture
def former(tmp_path, outer):
    return save_former(tmp_path / "former.safetensors", outer)


def test_arrays_and_configuration_are_read_back(path):
    arrays, config = weight_files.load(path, "small")
    assert config == {"width": 4} == weight_files.read_config(path, "small")
    assert {"kernel", "blocks.0.kernel", "blocks.1.bias"} <= set(arrays)
    abstract = jax.eval_shape(lambda: Small(4, rngs=nnx.Rngs(1)))
    restored = weight_files.restore(abstract, arrays)
    original = Small(4, rngs=nnx.Rngs(0))
    for name, value in weight_files.flatten(original).items():
        np.testing.assert_array_equal(value, weight_files.flatten(restored)[name])
    assert [file.name for file in path.parent.iterdir()] == ["a.safetensors"]


def test_the_names_of_a_decoders_tensors(tmp_path):
    """Other programs read these names, so they are part of the format."""
    decoder = Decoder(DECODER, rngs=nnx.Rngs(0))
    weight_files.save(tmp_path / "d.safetensors", decoder, "decoder", {})
    with safetensors.safe_open(tmp_path / "d.safetensors", framework="numpy") as file:
        assert sorted(file.keys()) == [
            "blocks.fc1", "blocks.fc2", "blocks.key", "blocks.out", "blocks.query", "blocks.value",
            "positions", "table",
        ]  # fmt: skip
        assert file.metadata()["format"] == "leon_jax/2"


def test_the_safetensors_library_reads_the_file(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "b.odd": rng.normal(size=3).astype(jnp.bfloat16),
        "a": rng.normal(size=(2, 3)).astype(np.float32).T,
        "z.whole": np.array(2.5, np.float64),
        "none": np.zeros((0, 4), np.float32),
        "small": rng.integers(-9, 9, 5).astype(np.int8),
        "flags": np.array([True, False, True]),
    }
    safetensors_format.write(tmp_path / "deep" / "t.safetensors", arrays, {"é": "ü", "a": "b"})
    data = (tmp_path / "deep" / "t.safetensors").read_bytes()
    assert int.from_bytes(data[:8], "little") % 8 == 0
    with safetensors.safe_open(tmp_path / "deep" / "t.safetensors", framework="numpy") as file:
        expected = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata, tensors = safetensors_format.read(tmp_path / "deep" / "t.safetensors")
    assert metadata == {"é": "ü", "a": "b"} and set(tensors) == set(expected) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(expected[name], array)
        np.testing.assert_array_equal(tensors[name], array)
        assert tensors[name].dtype == expected[name].dtype == array.dtype
    mode = stat.S_IMODE((tmp_path / "deep" / "t.safetensors").stat().st_mode)
    (tmp_path / "plain").write_text("")
    assert mode == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_processes_with_different_hash_seeds_write_equal_bytes(tmp_path):
    program = (
        "import sys, pathlib, numpy as np\n"
        "from leon_jax import safetensors_format\n"
        "names = {'kernel', 'bias', 'table', 'value', 'query'}\n"
        "safetensors_format.write(pathlib.Path(sys.argv[1]),\n"
        "    {name: np.arange(len(name), dtype=np.float32) for name in names},\n"
        "    dict.fromkeys({'format', 'kind', 'config', 'replaces'}, 'x'))\n"
    )
    contents = []
    for seed in ("1", "2"):
        path = tmp_path / f"{seed}.safetensors"
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", program, path], env=environment, check=True)
        contents.append(path.read_bytes())
    assert contents[0] == contents[1]


def test_saving_twice_writes_equal_bytes(path, tmp_path):
    model = Small(4, rngs=nnx.Rngs(0))
    weight_files.save(tmp_path / "second.safetensors", model, "small", {"width": 4})
    assert path.read_bytes() == (tmp_path / "second.safetensors").read_bytes()


def test_bfloat16_weights_are_restored_to_the_modules_dtype(tmp_path):
    model = Small(4, rngs=nnx.Rngs(0))
    weight_files.save(tmp_path / "b.safetensors", model, "small", {}, jnp.bfloat16)
    arrays, _ = weight_files.load(tmp_path / "b.safetensors", "small")
    assert arrays["kernel"].dtype == jnp.bfloat16
    restored = weight_files.restore(model, arrays)
    assert restored.kernel[...].dtype == jnp.float32
    np.testing.assert_allclose(restored.kernel[...], model.kernel[...], rtol=2**-8)


def test_a_missing_file_is_an_error_with_its_name(tmp_path):
    with pytest.raises(UserError, match=r"no small file at .*none\.safetensors"):
        weight_files.load(tmp_path / "none.safetensors", "small")


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_truncated_file_is_an_error_with_its_name(path, size):
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"a\.safetensors is not a whole safetensors file"):
        weight_files.load(path, "small")
    assert not weight_files.is_weight_file(path)


def test_another_kind_of_model_is_rejected(path, tmp_path):
    with pytest.raises(UserError, match="has small; a decoder file is needed"):
        weight_files.load(path, "decoder")
    safetensors.numpy.save_file({"a": np.zeros(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="has no leon_jax model; a decoder file is needed"):
        weight_files.load(tmp_path / "foreign.safetensors", "decoder")
    assert not weight_files.is_weight_file(tmp_path / "foreign.safetensors")


def test_another_configuration_is_rejected_with_the_first_difference(path):
    arrays, _ = weight_files.load(path, "small")
    with pytest.raises(UserError, match=r"'blocks.0.kernel' has shape \(4, 2\)|'kernel' has shape"):
        weight_files.restore(Small(5, rngs=nnx.Rngs(0)), arrays)
    arrays.pop("kernel")
    with pytest.raises(UserError, match="lacks the array 'kernel'"):
        weight_files.restore(Small(4, rngs=nnx.Rngs(0)), arrays)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_weights_that_are_not_finite_are_rejected_by_name(path, number, dtype):
    arrays, _ = weight_files.load(path, "small")
    array = arrays["blocks.1.kernel"].astype(dtype)
    array[2, 1] = number
    with pytest.raises(UserError, match=r"a file has NaN or infinite numbers in 'blocks.1.ker"):
        weight_files.restore(
            Small(4, rngs=nnx.Rngs(0)), arrays | {"blocks.1.kernel": array}, "a file"
        )


def test_a_file_of_the_former_format_is_read_under_full_names(former, outer):
    with safetensors.safe_open(former, framework="numpy") as file:
        assert sorted(file.keys()) == ["blocks", "blocks.query", "table"]
    arrays, config = weight_files.load(former, "outer")
    assert sorted(arrays) == ["blocks.query", "blocks.value", "table"] and config == {"a": 1}
    restored = weight_files.restore(Outer(rngs=nnx.Rngs(1)), arrays)
    np.testing.assert_array_equal(restored.blocks.value[...], outer.blocks.value[...])


def test_the_shipped_decoder_has_the_names_of_its_module():
    arrays, header = weight_files.load(SHIPPED, "decoder")
    config = build(DecoderConfig, header["model"])
    abstract = jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    assert {name: leaf.shape for name, leaf in weight_files.flatten(abstract).items()} == {
        name: array.shape for name, array in arrays.items()
    }


def test_a_digest_does_not_depend_on_the_order_or_the_format(former, outer, tmp_path):
    path = tmp_path / "present.safetensors"
    weight_files.save(path, outer, "outer", {"a": 1})
    assert path.read_bytes() != former.read_bytes()
    assert weight_digests.content_digest(path) == weight_digests.content_digest(former)
    assert weight_digests.sampled_digest(path) == weight_digests.sampled_digest(former)
    outer.blocks.query[...] = outer.blocks.query[...].at[3, 3].add(1)
    weight_files.save(path, outer, "outer", {"a": 1})
    assert weight_digests.content_digest(path) != weight_digests.content_digest(former)
    assert weight_digests.sampled_digest(path) != weight_digests.sampled_digest(former)


def test_a_digest_depends_on_kind_configuration_and_types(tmp_path, outer):
    digests = set()
    for number, (kind, config, dtype) in enumerate(
        [("a", {}, None), ("b", {}, None), ("a", {"x": 1}, None), ("a", {}, jnp.bfloat16)]
    ):
        path = tmp_path / f"{number}.safetensors"
        weight_files.save(path, outer, kind, config, dtype)
        digests.add(weight_digests.content_digest(path))
    assert len(digests) == 4
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    weight_files.save(first, outer, "a", {"x": 1, "y": 2})
    weight_files.save(second, outer, "a", {"y": 2, "x": 1})
    assert weight_digests.content_digest(first) == weight_digests.content_digest(second)


def test_a_digest_never_changes(tmp_path):
    """Folders record it, so its definition is fixed."""
    arrays = {"b": np.arange(3, dtype=np.int8), "a": np.array([[1.5]], np.float32)}
    metadata = {"format": "leon_jax/2", "kind": "k", "config": '{"y": 1, "x": [2]}'}
    safetensors_format.write(tmp_path / "d.safetensors", arrays, metadata)
    content = b'k\n{"x": [2], "y": 1}\n' + b"a float32 [1, 1]\n" + arrays["a"].tobytes()
    content += b"b int8 [3]\n" + arrays["b"].tobytes()
    expected = hashlib.sha256(content).hexdigest()
    assert weight_digests.content_digest(tmp_path / "d.safetensors") == expected


def test_a_sampled_digest_reads_64_samples_across_tensors(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {name: rng.integers(0, 255, size, np.uint8) for name, size in
              (("a", 200_000), ("b", 3), ("c", 150_000))}  # fmt: skip
    metadata = {"format": "leon_jax/2", "kind": "k", "config": "{}"}
    path = tmp_path / "d.safetensors"
    safetensors_format.write(path, arrays, metadata)
    data = b"".join(array.tobytes() for array in arrays.values())
    content = "".join(f"{name} uint8 [{len(array)}]\n" for name, array in arrays.items()).encode()
    for sample in range(64):
        start = len(data) * sample // 64
        content += data[start : start + 4096]
    assert weight_digests.sampled_digest(path) == hashlib.sha256(content).hexdigest()[:12]


def test_an_upgraded_file_matches_the_digests_of_its_former_bytes(former, tmp_path):
    data = former.read_bytes()
    recorded = hashlib.sha256(data).hexdigest()
    assert weight_digests.same_weights(former, recorded), "the digest of the bytes"
    arrays, config = weight_files.load(former, "outer")
    content, sampled = weight_digests.content_digest(former), weight_digests.sampled_digest(former)
    in_images = weight_digests.former_sampled_digests(former)
    assert len(in_images) == 1

    assert weight_digests.upgrade(former)
    assert weight_digests.content_digest(former) == content
    assert weight_digests.sampled_digest(former) == sampled
    for digest in (recorded, content, hashlib.sha256(former.read_bytes()).hexdigest()):
        assert weight_digests.same_weights(former, digest)
    assert not weight_digests.same_weights(former, "0" * 64)
    assert weight_digests.former_sampled_digests(former)[1:] == in_images
    with safetensors.safe_open(former, framework="numpy") as file:
        assert sorted(file.keys()) == ["blocks.query", "blocks.value", "table"]
        assert json.loads(file.metadata()["replaces"]) == [recorded, *in_images]
    new_arrays, new_config = weight_files.load(former, "outer")
    assert new_config == config
    assert all((new_arrays[name] == arrays[name]).all() for name in arrays)

    upgraded = former.read_bytes()
    assert not weight_digests.upgrade(former) and former.read_bytes() == upgraded
    former.write_bytes(data)
    weight_digests.upgrade(former)
    assert former.read_bytes() == upgraded, "upgrading is deterministic"


def test_the_former_digest_in_images_equals_that_of_older_versions():
    """The version that wrote the shipped decoder computed the digest in this way."""
    data = SHIPPED.read_bytes()
    digest = hashlib.sha256(str(len(data)).encode())
    for sample in range(64):
        start = len(data) * sample // 64
        digest.update(data[start : start + 4096])
    assert weight_digests.former_sampled_digests(SHIPPED) == [digest.hexdigest()[:12]]
