"""Checks that a run is continued with the configuration that it was started with."""

import json
import pathlib
from typing import Any

import jax

from leon_jax import storage
from leon_jax.config import UserError

# Keys that may change between starts: a run's length, and settings without effect on results.
MAY_CHANGE = (
    "steps", "optimizer.total_steps", "optimizer.decay_steps", "data.threads", "data.eval_split",
    "data.eval_documents", "model.remat",
)  # fmt: skip
# Keys of earlier versions, and the value that this version always uses.
REMOVED = {
    "data.spare_spans": 4,
    "data.flip": True,
    "data.min_crop": 0.75,
    "model.max_scale": 100.0,
    "model.pad_id": 1,
}


def check_config(path: pathlib.Path, config: dict[str, Any]) -> None:
    """Compares a run's configuration with the saved one, then saves it.

    Nothing is compared if the run has no checkpoint yet. Keys of `MAY_CHANGE`, of `loop` and of
    `export` may differ, so that a run can be extended or move to other devices. A key of `REMOVED`
    may be missing in `config` if the run had the value that this version always uses.

    Args:
      path: the file of the saved configuration; the folder `checkpoints` is next to it.
      config: the configuration of this start.

    Raises:
      UserError: another key differs; the message names the first one.
    """
    config = json.loads(json.dumps(config))
    if path.exists() and any(path.parent.glob("checkpoints/[0-9]*")):
        saved = json.loads(path.read_text())
        for key, (old, new) in differences(saved, config).items():
            if key in REMOVED and new is None:
                if old != REMOVED[key]:
                    raise UserError(
                        f"{path.parent} holds a run with {key} = {old!r}, but this version always "
                        f"uses {REMOVED[key]!r}; use another --workdir"
                    )
            elif key not in MAY_CHANGE and key.split(".")[0] not in ("loop", "export"):
                raise UserError(
                    f"{path.parent} holds a run with {key} = {old!r}, but it is now {new!r}; "
                    "use another --workdir or restore the value"
                )
    if jax.process_index() == 0:
        storage.write(path, json.dumps(config, indent=1))


def differences(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Returns the (old, new) values of two nested mappings by dotted key, where they differ.

    A key that one of them lacks has the value None there.
    """
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return {} if old == new else {prefix.removesuffix("."): (old, new)}
    pairs: dict[str, tuple[Any, Any]] = {}
    for key in [*new, *(key for key in old if key not in new)]:
        pairs |= differences(old.get(key), new.get(key), f"{prefix}{key}.")
    return pairs
