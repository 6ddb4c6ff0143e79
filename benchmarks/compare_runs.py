"""Whether two runs of `leon train` ended the same, bit for bit."""

import json
import pathlib
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from leon_jax import weight_files

# What a line of metrics says about the training itself; the rest is about time.
LOGGED = ("step", "loss", "loss_text", "loss_image", "gradient_norm", "learning_rate", "skipped")


def differences(one: pathlib.Path, other: pathlib.Path) -> list[str]:
    """A sentence for everything that differs between two workdirs, the newest checkpoint first."""
    first, second = contents(one), contents(other)
    found = []
    for name in [*first, *(name for name in second if name not in first)]:
        if name not in first or name not in second:
            found.append(f"{name} is missing in {one if name not in first else other}")
        elif not isinstance(first[name], np.ndarray):
            if first[name] != second[name]:
                found.append(f"{name} differs: {first[name]} and {second[name]}")
        elif sentence := _arrays_differ(first[name], second[name]):
            found.append(f"{name} differs: {sentence}")
    return found


def contents(workdir: pathlib.Path) -> dict[str, Any]:
    """Everything of a finished decoder run that must not depend on how it went, by name.

    That is: the newest checkpoint with every array (parameters, optimizer, random key) and the
    position in the data, what was logged of each step, and the exported model.
    """
    steps = [int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    path = workdir.absolute() / "checkpoints" / str(max(steps))
    # Onto one device, whatever devices it was saved from.
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)
        for name, leaf in ocp.checkpointables_metadata(path).metadata["state"].items()
    }
    saved = ocp.load_checkpointables(path, {"state": target, "data": None})
    found: dict[str, Any] = {"the newest step": max(steps)}
    found |= {name: np.asarray(array) for name, array in saved["state"].items()}
    found |= {f"data position {name}": value for name, value in saved["data"].items()}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        logged = {name: values[name] for name in LOGGED if name in values}
        found[f"what was logged of step {values['step']}"] = logged
    # Not its bytes: safetensors writes the entries of a header in any order.
    arrays, config = weight_files.load(workdir / "export" / "decoder.safetensors", "decoder")
    found |= {f"exported {name}": array for name, array in arrays.items()}
    return found | {"exported configuration": config}


def _arrays_differ(one: np.ndarray, other: np.ndarray) -> str:
    """How, or "" if they are equal; by their bits, so that NaN equals itself and -0 is not 0."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return f"{one.dtype}{list(one.shape)} and {other.dtype}{list(other.shape)}"
    bits = [np.frombuffer(array.tobytes(), f"V{array.itemsize}") for array in (one, other)]
    count = int((bits[0] != bits[1]).sum())
    return f"{count:,} of {one.size:,} numbers" if count else ""
