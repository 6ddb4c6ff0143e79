"""Compares two finished runs of `leon train` bit for bit."""

import json
import pathlib
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from leon_jax import weight_files

# Metrics of the training itself; all others depend on time.
LOGGED = (
    "step", "loss", "loss_text", "loss_image", "gradient_norm", "learning_rate", "skipped",
    "l1", "lpips", "psnr_db", "codebook_loss", "codes_used", "codes_revived", "generator_gan_loss",
    "discriminator_loss", "adaptive_weight", "score_real", "score_fake", "accuracy", "scale",
)  # fmt: skip


def differences(one: pathlib.Path, other: pathlib.Path) -> list[str]:
    """Returns a sentence for each difference between two workdirs, checkpoints first."""
    first, second = contents(one), contents(other)
    sentences = []
    for name in [*first, *(name for name in second if name not in first)]:
        if name not in first or name not in second:
            sentences.append(f"{name} is missing in {one if name not in first else other}")
        elif not isinstance(first[name], np.ndarray):
            if first[name] != second[name]:
                sentences.append(f"{name} differs: {first[name]} and {second[name]}")
        elif sentence := _arrays_differ(first[name], second[name]):
            sentences.append(f"{name} differs: {sentence}")
    return sentences


def contents(workdir: pathlib.Path) -> dict[str, Any]:
    """Returns the results of a finished run that must not depend on interruptions, by name.

    These are the newest checkpoint with all arrays (parameters, optimizer, random key) and the data
    position, the logged metrics of each step, and the exported model.
    """
    steps = [int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    path = workdir.absolute() / "checkpoints" / str(max(steps))
    # Load onto one device, whatever the mesh of the run.
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)
        for name, leaf in ocp.checkpointables_metadata(path).metadata["state"].items()
    }
    saved = ocp.load_checkpointables(path, {"state": target, "data": None})
    results: dict[str, Any] = {"the newest step": max(steps)}
    results |= {name: np.asarray(array) for name, array in saved["state"].items()}
    results |= {f"data position {name}": value for name, value in saved["data"].items()}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        logged = {name: values[name] for name in LOGGED if name in values}
        results[f"metrics of step {values['step']}"] = logged
    # A decoder's export is a model folder, with the files of the other models.
    kind = json.loads((workdir / "config.json").read_text())["kind"]
    arrays, config = weight_files.load(workdir / "export" / f"{kind}.safetensors", kind)
    results |= {f"exported {name}": array for name, array in arrays.items()}
    return results | {"exported configuration": config}


def _arrays_differ(one: np.ndarray, other: np.ndarray) -> str:
    """Describes the difference of two arrays, or returns "" if their bits are equal."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return f"{one.dtype}{list(one.shape)} and {other.dtype}{list(other.shape)}"
    bits = [np.frombuffer(array.tobytes(), f"V{array.itemsize}") for array in (one, other)]
    count = int((bits[0] != bits[1]).sum())
    return f"{count:,} of {one.size:,} numbers" if count else ""
