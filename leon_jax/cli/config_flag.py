"""The flag --config, the same in every verb that reads an experiment's file."""

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
    if flag.value is None:
        raise UserError(f"--config is missing; for example --config={example}")
    try:
        return flag.value.to_dict()
    except OSError as error:  # the flag puts off its complaint until it is used
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"the config file cannot be loaded: {reason}") from error
