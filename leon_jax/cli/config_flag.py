"""Defines the flag --config and reads the config file it names; shared by several commands."""

import os
from typing import Any

from absl import flags
from ml_collections import config_flags

from leon_jax.config import UserError

# The flag then belongs to the command that defines it, and the command's --help lists it.
flags.disclaim_key_flags()


def define(values: flags.FlagValues = flags.FLAGS) -> flags.FlagHolder:
    """Defines --config.

    A config file lists only the keys that differ from the defaults, so any key can be overridden
    on the command line. Unknown keys are rejected later, where the configuration is built.
    """
    return config_flags.DEFINE_config_file(
        "config",
        None,
        "The experiment's config file.",
        flag_values=values,
        lock_config=False,
        accept_new_attributes=True,
    )


def read(flag: flags.FlagHolder, example: str) -> dict[str, Any]:
    """Returns the configuration with the overrides of the command line.

    Raises:
      UserError: the flag is missing (the message shows `example`), or the file cannot be loaded.
    """
    if not flag.present:
        raise UserError(f"--config is missing; for example --config={example}")
    path = _path(flag)
    if not path:
        raise UserError(f"--config is empty; for example --config={example}")
    try:
        to_dict = getattr(flag.value, "to_dict", None)
    except OSError as error:  # config_flags raises it only when the value is read
        raise UserError(_unreadable(path)) from error
    if to_dict is None:
        kind = "nothing" if flag.value is None else type(flag.value).__name__
        raise UserError(f"get_config of {path} returns {kind}; it must return a ConfigDict")
    return to_dict()


def _path(flag: flags.FlagHolder) -> str:
    """Returns the path of the config file, without the argument of get_config after a colon."""
    filename = flag._flagvalues[flag.name].config_filename  # type: ignore[attr-defined]
    return str(filename).partition(":")[0]


def _unreadable(path: str) -> str:
    """Returns the error message for a config file, or a file that it opens, that is unreadable."""
    if os.path.isdir(path):
        return f"--config={path} is a folder; it must be a Python file"
    if not os.path.exists(path):
        return f"there is no config file {path}"
    if not os.access(path, os.R_OK):
        return f"the config file {path} cannot be read: permission denied"
    return f"the config file {path} needs a file that cannot be read"
