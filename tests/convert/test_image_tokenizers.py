"""Published image tokenizers equal an independent network in PyTorch, and leave as they came."""

import functools
import json
import pathlib
import re

import jax
import numpy as np
import pytest
import yaml
from flax import nnx

from leon_jax import config as configuration
from leon_jax import sharding, weight_files
from leon_jax.cli import main
from leon_jax.convert import check, torch_file
from leon_jax.models.vqgan import VQGAN, VQGANConfig
from leon_jax.tokenizers.image import ImageTokenizer
from tests import peers

SMALL = {
    "ch": 64, "ch_mult": [1, 1, 2], "num_res_blocks": 2, "attn_resolutions": [8], "resolution": 32,
    "z_channels": 32, "embed_dim": 32, "n_embed": 64,
}  # fmt: skip
_TAMING_ONLY = ("attn_resolutions", "resolution")
KINDS = {
    "vq": {"family": "taming", "kind": "vq", **SMALL},
    "ema": {"family": "taming", "kind": "ema", **SMALL},
    "gumbel": {"family": "taming", "kind": "gumbel", **SMALL},
    "ldm": {"family": "taming", "kind": "vq", **SMALL, "ch_mult": [1, 2], "attn_resolutions": [],
            "z_channels": 4, "embed_dim": 4},
    "llamagen": {
        "family": "llamagen", **{key: SMALL[key] for key in SMALL if key not in _TAMING_ONLY},
        "embed_dim": 8,
    },
}  # fmt: skip
ENVELOPES = {"taming": "state_dict", "llamagen": "model"}


@functools.cache
def peer(name, folder):
    """Returns images, and what the network in PyTorch makes of them; writes its checkpoint."""
    options = KINDS[name]
    path = folder / f"{name}.ckpt"
    options = options | {"seed": 3, "file": str(path), "envelope": ENVELOPES[options["family"]]}
    images = np.random.default_rng(0).uniform(-1, 1, (5, 3, 32, 32)).astype(np.float32)
    # Neighbouring pixels are alike, so that codes do not hang on the last digit.
    images = (images + np.roll(images, 1, 2) + np.roll(images, 1, 3)) / 3
    script = pathlib.Path(__file__).with_name("tokenizers_in_torch.py")
    kind = np.frombuffer(json.dumps(options).encode(), np.uint8)
    return path, images, peers.run_peer(script, {"kind": kind, "images": images})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture
def without_check(monkeypatch):
    """Leaves out the check at the end, whose compilation takes most of the time."""
    known = check.Reconstruction(check.PLAUSIBLE, np.zeros((1, 1), int))
    monkeypatch.setattr(check, "reconstruction", lambda path: known)


def convert(capsys, *arguments):
    code = main.run(["convert", *map(str, arguments)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.mark.peers
@pytest.mark.parametrize(
    "name",
    [
        "vq",
        "gumbel",
        "llamagen",
        pytest.param("ema", marks=pytest.mark.slow),
        pytest.param("ldm", marks=pytest.mark.slow),
    ],
)
def test_codes_and_images_equal_those_of_pytorch(name, folder, tmp_path, capsys):
    path, images, expected = peer(name, folder)
    family = KINDS[name]["family"]
    code, output, error = convert(
        capsys, f"--from={family}", f"--source={path}", "--resolution=32", f"--out={tmp_path}/ours"
    )
    assert code == 0, error
    assert "licence MIT" in output and "below 15 dB" in error, "the weights are random"
    with jax.set_mesh(sharding.make_mesh()):
        tokenizer = ImageTokenizer.load(tmp_path / "ours" / "tokenizer.safetensors")
        ours = images.transpose(0, 2, 3, 1)
        np.testing.assert_allclose(
            tokenizer.model.to_code(tokenizer.model.encoder(ours)), expected["latents"], atol=1e-4
        )
        codes = tokenizer.encode(ours)
        np.testing.assert_array_equal(codes, expected["codes"])
        decoded = np.asarray(tokenizer.model.decode(codes))
    largest = np.abs(expected["decoded"]).max()
    np.testing.assert_allclose(decoded, expected["decoded"], atol=1e-4 * largest)
    assert len(np.unique(codes)) > 8 and np.std(expected["decoded"]) > 0.05


@pytest.mark.peers
@pytest.mark.parametrize("name", KINDS)
def test_tensors_leave_as_they_came(name, folder, tmp_path, capsys, without_check):
    path, _, _ = peer(name, folder)
    family = KINDS[name]["family"]
    flags = [f"--from={family}", f"--source={path}", "--resolution=32", f"--out={tmp_path}/ours"]
    assert convert(capsys, *flags)[0] == 0
    assert convert(
        capsys, f"--to={family}", f"--source={tmp_path}/ours", f"--out={tmp_path}/theirs"
    )[0] == 0  # fmt: skip
    before = torch_file.read_weights(path)
    after = torch_file.read_weights(tmp_path / "theirs" / "weights.ckpt")
    record = json.loads((tmp_path / "ours" / "conversion.json").read_text())
    assert set(before) - set(record["dropped"]) == set(after) == set(record["tensors"])
    for tensor, array in after.items():
        np.testing.assert_array_equal(array, before[tensor])
    # The YAML file that is written describes the weights.
    if family == "taming":
        again = [f"--config={tmp_path}/theirs/model.yaml", f"--out={tmp_path}/again"]
        flags = [f"--from={family}", f"--source={tmp_path}/theirs/weights.ckpt", *again]
        assert convert(capsys, *flags)[0] == 0
        files = [tmp_path / each / "tokenizer.safetensors" for each in ("ours", "again")]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.fixture
def small(tmp_path, capsys, without_check):
    """A checkpoint that our writer wrote, and its tensors."""
    config = VQGANConfig(
        resolution=16, channels=32, multipliers=(1, 2), blocks=1, attention_sizes=(8,),
        latent=8, code_dim=8, codes=16,
    )  # fmt: skip
    with jax.set_mesh(sharding.make_mesh()):
        model = VQGAN(config, rngs=nnx.Rngs(0))
        path = tmp_path / "tokenizer.safetensors"
        weight_files.save(path, model, "tokenizer", configuration.to_dict(config))
    flags = ["--to=taming", f"--source={path}", f"--out={tmp_path}/taming"]
    assert convert(capsys, *flags)[0] == 0
    return torch_file.read_weights(tmp_path / "taming" / "weights.ckpt")


def first(tensors, part):
    return next(name for name in tensors if part in name)


def test_what_only_training_needs_is_left_out(small, tmp_path, capsys):
    more = {
        "loss.discriminator.main.0.weight": np.zeros((4, 3, 4, 4), np.float32),
        "quantize.embedding.cluster_size": np.zeros(16, np.float32),
    }
    torch_file.write(tmp_path / "last.ckpt", {**small, **more}, "state_dict")
    code, output, _ = convert(
        capsys, "--from=taming", f"--source={tmp_path}/last.ckpt", "--resolution=16",
        f"--out={tmp_path}/ours",
    )  # fmt: skip
    assert code == 0 and "left out: 2 tensors" in output
    record = json.loads((tmp_path / "ours" / "conversion.json").read_text())
    assert record["dropped"].keys() == more.keys()
    assert record["config"]["codes"] == 16 and record["licence"] == "MIT"


def missing(tensors):
    del tensors[first(tensors, "mid.attn_1.q.weight")]
    return r"lacks encoder\.mid\.attn_1\.q\.weight"


def renamed(tensors):
    name = first(tensors, "decoder.conv_out.bias")
    tensors["decoder.conv_end.bias"] = tensors.pop(name)
    return r"lacks decoder\.conv_out\.bias"


def unknown(tensors):
    tensors["decoder.extra"] = np.zeros(3, np.float32)
    return r"unknown tensors: decoder\.extra"


def transposed(tensors):
    tensors["decoder.conv_in.weight"] = tensors["decoder.conv_in.weight"].swapaxes(0, 1)
    return r"another shape than the configuration says: decoder\.conv_in\.weight"


def not_finite(tensors):
    name = first(tensors, "norm1.weight")
    tensors[name] = np.full_like(tensors[name], np.nan)
    return "NaN or infinite"


def grey(tensors):
    name = "encoder.conv_in.weight"
    tensors[name] = tensors[name][:, :1]
    return "1 channels; only RGB"


@pytest.mark.parametrize("damage", [missing, renamed, unknown, transposed, not_finite, grey])
def test_wrong_tensors_are_refused_by_name_and_nothing_is_written(damage, small, tmp_path, capsys):
    tensors = dict(small)
    message = damage(tensors)
    torch_file.write(tmp_path / "last.ckpt", tensors, "state_dict")
    code, _, error = convert(
        capsys, "--from=taming", f"--source={tmp_path}/last.ckpt", f"--out={tmp_path}/ours"
    )
    assert code == 2
    assert re.search(message, error), error
    assert not (tmp_path / "ours").exists() and not list(tmp_path.glob(".*writing"))


@pytest.mark.parametrize(
    ("key", "value"), [("n_embed", 8), ("ch_mult", [1, 4]), ("attn_resolutions", []), ("ch", 64)]
)
def test_a_configuration_that_does_not_fit_the_tensors_is_refused(
    key, value, small, tmp_path, capsys
):
    path = tmp_path / "taming" / "model.yaml"
    content = yaml.safe_load(path.read_text())
    params = content["model"]["params"]
    (params if key in params else params["ddconfig"])[key] = value
    path.write_text(yaml.safe_dump(content))
    code, _, error = convert(
        capsys, "--from=taming", f"--source={tmp_path}/taming/weights.ckpt", f"--config={path}",
        f"--out={tmp_path}/ours",
    )  # fmt: skip
    assert code == 2 and f"says {key}" in error and not (tmp_path / "ours").exists()


def test_a_folder_with_other_files_is_not_replaced(small, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.png").write_text("x")
    flags = ["--from=taming", f"--source={tmp_path}/taming/weights.ckpt", f"--out={tmp_path}/mine"]
    code, _, error = convert(capsys, *flags)
    assert code == 2 and "has other files" in error
    assert (tmp_path / "mine" / "photo.png").exists()


def test_missing_flags_and_files_are_told(tmp_path, capsys):
    assert "give --from or --to" in convert(capsys, "--source=x", "--out=y")[2]
    assert "--source is missing" in convert(capsys, "--from=taming", "--out=y")[2]
    assert "--out is missing" in convert(capsys, "--from=taming", "--source=x")[2]
    flags = ["--from=taming", f"--source={tmp_path}/no.ckpt", f"--out={tmp_path}/y"]
    assert "there is no checkpoint at" in convert(capsys, *flags)[2]
