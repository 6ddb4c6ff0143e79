"""The flag --config, the same in every verb that reads an experiment's file."""

import os
from typing import Any

from absl import flags
from ml_collections import config_flags

from leon_jax.config import UserError

# The flag belongs to the verb that asks for it, so that its --help shows it.
flags.disclaim_key_flags()


def define(values: flags.FlagValues = flags.FLAGS) -> flags.FlagHolder:
    """Defines --config.

    A file says what departs from the defaults, so keys that it leaves out can be set as well.
    Whether a key exists is checked where its value is used, and the answer names the nearest one.
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
    """The configuration, with what the command line sets.

    Raises:
      UserError: the flag is missing (then `example` is shown), or the file cannot be loaded.
    """
    if not flag.present:
        raise UserError(f"--config is missing; for example --config={example}")
    path = _path(flag)
    if not path:
        raise UserError(f"--config is empty; for example --config={example}")
    try:
        to_dict = getattr(flag.value, "to_dict", None)
    except OSError as error:  # the flag puts off its complaint until it is used
        raise UserError(_unreadable(path)) from error
    if to_dict is None:
        kind = "nothing" if flag.value is None else type(flag.value).__name__
        raise UserError(f"get_config of {path} returns {kind}; it must return a ConfigDict")
    return to_dict()


def _path(flag: flags.FlagHolder) -> str:
    """The config file as it was named, without what its get_config is given after a colon."""
    named = flag._flagvalues[flag.name].config_filename  # type: ignore[attr-defined]
    return str(named).partition(":")[0]


def _unreadable(path: str) -> str:
    """Why a config file could not be loaded: by itself, or for a file that it reads."""
    if os.path.isdir(path):
        return f"--config={path} is a folder; it must be a Python file"
    if not os.path.exists(path):
        return f"there is no config file {path}"
    if not os.access(path, os.R_OK):
        return f"the config file {path} must not be read"
    return f"the config file {path} needs a file that cannot be read"
