"""Files of `torch.save`: what is read, and that nothing in them runs."""

import os
import pathlib
import pickle
import subprocess
import zipfile

import ml_dtypes
import numpy as np
import pytest

from leon_jax.config import UserError
from leon_jax.convert import torch_file
from tests import peers


class Hostile:
    """A pickle of it asks for a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def archive(path, content, **members):
    """Writes an archive as torch.save does."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("name/data.pkl", pickle.dumps(content, protocol=2))
        for name, data in members.items():
            file.writestr(f"name/{name}", data)
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder of files that PyTorch wrote, and the tensors in them."""
    folder = tmp_path_factory.mktemp("torch")
    script = pathlib.Path(__file__).with_name("torch_files_in_torch.py")
    name = np.frombuffer(str(folder).encode(), np.uint8)
    return folder, peers.run_peer(script, {"folder": name})


@pytest.mark.peers
@pytest.mark.parametrize("name", ["new.ckpt", "old.ckpt", "bare.pt"])
def test_tensors_equal_those_that_pytorch_saved(written, name):
    folder, expected = written
    tensors = torch_file.read_weights(folder / name)
    assert tensors.keys() == expected.keys()
    for key, tensor in tensors.items():
        assert not tensor.flags.writeable or tensor.size == 0
        if key == "bfloat16":
            assert tensor.dtype == ml_dtypes.bfloat16
            tensor = tensor.astype(np.float32)
        assert tensor.dtype == expected[key].dtype and tensor.shape == expected[key].shape
        np.testing.assert_array_equal(tensor, expected[key])


@pytest.mark.peers
@pytest.mark.parametrize("name", ["new.ckpt", "old.ckpt"])
def test_objects_of_other_classes_are_placeholders(written, name):
    content = torch_file.read(written[0] / name)
    assert content["epoch"] == 3 and content["optimizer"]["step"] == 7
    assert content["hyper"][2] == {1, 2}
    for value in (*content["callbacks"].values(), content["numpy"], *content["hyper"][:2]):
        kind = value if isinstance(value, type) else type(value)
        assert issubclass(kind, torch_file.Placeholder)


@pytest.mark.peers
def test_the_state_of_a_module_is_read(written):
    assert torch_file.read_weights(written[0] / "linear.pth").keys() == {"weight", "bias"}


@pytest.mark.peers
def test_a_program_is_refused(written):
    with pytest.raises(UserError, match=r"script\.pt is a TorchScript archive, which is a program"):
        torch_file.read(written[0] / "script.pt")


@pytest.mark.peers
@pytest.mark.parametrize("name", ["new.ckpt", "old.ckpt"])
def test_a_file_that_ends_early_is_refused(written, tmp_path, name):
    data = (written[0] / name).read_bytes()
    for length in (0, 1, 50, len(data) // 2, len(data) - 1):
        (tmp_path / name).write_bytes(data[:length])
        with pytest.raises(UserError, match=rf"{name} is damaged"):
            torch_file.read(tmp_path / name)


@pytest.mark.parametrize("function", [os.system, eval, subprocess.run, pathlib.Path.write_text])
def test_nothing_in_a_file_runs(tmp_path, function):
    command = f"touch {tmp_path / 'ran'}"
    arguments = {
        eval: (f"open({str(tmp_path / 'ran')!r}, 'w').close()",),
        subprocess.run: (command, -1, None, None, None, None, None, False, True),
        pathlib.Path.write_text: (tmp_path / "ran", "x"),
    }.get(function, (command,))
    hostile = Hostile(function, *arguments)
    # The calls do run if Python's own pickle reads them.
    pickle.loads(pickle.dumps(hostile))
    (tmp_path / "ran").unlink()
    path = archive(tmp_path / "hostile.pt", {"state_dict": {}, "weights": hostile})
    content = torch_file.read(path)
    assert isinstance(content["weights"], torch_file.Placeholder)
    (tmp_path / "old.pt").write_bytes(pickle.dumps(hostile, protocol=2))
    with pytest.raises(UserError, match=r"no file of torch\.save"):
        torch_file.read(tmp_path / "old.pt")
    assert not (tmp_path / "ran").exists()


def tensor_file(path, **claims):
    """Writes an archive with one storage of four numbers and a tensor in it.

    The pickle is assembled by hand, since its names do not exist here.
    """
    size, kind = claims.get("size", 4), claims.get("kind", "FloatStorage")
    start, shape, strides = claims["view"]
    numbers = b"".join(
        b"(" + b"".join(b"J" + int(n).to_bytes(4, "little", signed=True) for n in row) + b"t"
        for row in (shape, strides)
    )
    storage = (
        b"(X\x07\x00\x00\x00storagectorch\n" + kind.encode() + b"\n"
        b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuJ" + size.to_bytes(4, "little") + b"tQ"
    )
    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage
        + b"J" + int(start).to_bytes(4, "little", signed=True) + numbers + b"\x89}tR"
    )  # fmt: skip
    program = b"\x80\x02}X\x01\x00\x00\x00w" + tensor + b"s."
    with zipfile.ZipFile(path, "w", claims.get("compression", zipfile.ZIP_STORED)) as file:
        file.writestr("name/data.pkl", program)
        file.writestr("name/data/0", np.arange(4, dtype=np.float32).tobytes())
    return path


def test_a_compressed_archive_is_read(tmp_path):
    path = tensor_file(
        tmp_path / "file.pt", view=(0, (2, 2), (1, 2)), compression=zipfile.ZIP_DEFLATED
    )
    np.testing.assert_array_equal(torch_file.read_weights(path)["w"], [[0, 2], [1, 3]])


@pytest.mark.parametrize(
    "claims",
    [
        {"view": (1, (4,), (1,))},
        {"view": (0, (2, 2), (2, 2))},
        {"view": (0, (4,), (2,))},
        {"view": (-1, (2,), (1,))},
        {"view": (3, (2,), (-1,))},
        {"view": (0, (4,), (1,)), "size": 5},
        {"view": (0, (2,), (1,)), "size": 2},
        {"view": (0, (4,), (1,)), "kind": "UnknownStorage"},
    ],
)
def test_a_tensor_outside_of_its_storage_is_refused(tmp_path, claims):
    with pytest.raises(UserError, match="is damaged"):
        torch_file.read(tensor_file(tmp_path / "file.pt", **claims))


@pytest.mark.parametrize("envelope", ["", "state_dict"])
def test_what_is_written_is_read_back(tmp_path, envelope):
    tensors = tensors_of_many_types()
    torch_file.write(tmp_path / "one.pt", tensors, envelope)
    read = torch_file.read_weights(tmp_path / "one.pt")
    assert list(read) == list(tensors)
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        np.testing.assert_array_equal(read[name], tensor)
    again = tmp_path / "again" / "one.pt"
    again.parent.mkdir()
    torch_file.write(again, tensors, envelope)
    assert again.read_bytes() == (tmp_path / "one.pt").read_bytes()


@pytest.mark.peers
def test_pytorch_loads_what_is_written(tmp_path):
    tensors = tensors_of_many_types()
    torch_file.write(tmp_path / "weights.ckpt", tensors, "state_dict")
    script = pathlib.Path(__file__).with_name("torch_load_in_torch.py")
    name = np.frombuffer(str(tmp_path / "weights.ckpt").encode(), np.uint8)
    loaded = peers.run_peer(script, {"file": name})
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(loaded[name], tensor.astype(loaded[name].dtype))


def tensors_of_many_types():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, 4))
    return {
        "layers.0.weight": values.astype(np.float32),
        "transposed": values.astype(np.float32).T,
        "half": values.astype(np.float16),
        "bfloat16": values.astype(ml_dtypes.bfloat16),
        "ints": np.arange(5),
        "bytes": np.arange(5, dtype=np.uint8),
        "scalar": np.array(3, np.float32),
        "empty": np.zeros((0, 2), np.float32),
    }


def test_a_file_without_tensors_by_name_is_refused(tmp_path):
    path = archive(tmp_path / "file.pt", {"epoch": 1, "state_dict": {"a": 2}})
    with pytest.raises(UserError, match=r"file\.pt has no tensors by name; it has a"):
        torch_file.read_weights(path)
    with pytest.raises(UserError, match=r"cannot read .*missing\.pt"):
        torch_file.read_weights(tmp_path / "missing.pt")
