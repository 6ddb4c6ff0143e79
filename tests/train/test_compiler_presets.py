"""Which options of the compiler a run gets, by the devices."""

import types

import jax
import pytest

from leon_jax.config import UserError
from leon_jax.train import compiler_presets
from leon_jax.train.compiler_presets import PRESETS, options


def device(kind: str, platform: str = "tpu") -> jax.Device:
    return types.SimpleNamespace(device_kind=kind, platform=platform)  # type: ignore[return-value]


@pytest.mark.parametrize(
    "kind, name",
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("TPU v4", ""),
    ],
)
def test_auto_takes_the_preset_of_the_devices(kind, name):
    assert compiler_presets.preset_of(device(kind)) == name
    assert options("auto", device(kind)) == PRESETS.get(name, {})


def test_a_gpu_has_its_preset_and_a_cpu_none():
    assert options("auto", device("NVIDIA H100", "gpu")) == PRESETS["gpu"]
    assert options("auto", jax.devices("cpu")[0]) == {}


def test_without_a_name_the_compiler_has_its_defaults():
    assert options("", device("TPU v5")) == {}


def test_a_preset_of_other_devices_is_refused():
    with pytest.raises(UserError, match="'v6e', but the devices are TPU v5; set 'v5p' or 'auto'"):
        options("v6e", device("TPU v5"))
    with pytest.raises(UserError, match="leave it empty, or set 'auto'"):
        options("v5p", jax.devices("cpu")[0])


def test_an_unknown_preset_is_refused_with_the_names():
    with pytest.raises(UserError, match="is 'fast'; it must be empty or one of auto, v5e, v5p"):
        options("fast", device("TPU v5"))
