"""Finds the config files that the package includes, so that they work without the repository."""

import os
import pathlib

# The config files of the package.
PRESETS = pathlib.Path(__file__).parents[1] / "configs"


def find_preset(argument: str) -> str:
    """Returns an argument --config=FILE with the path of the packaged preset, if FILE is one.

    A preset is called as in the repository, for example configs/own.py. A file of that name in the
    current folder comes first.

    Args:
      argument: any argument of the command line.
    """
    flag, equals, value = argument.partition("=")
    path, colon, rest = value.partition(":")
    if flag not in ("--config", "-config") or not equals or os.path.exists(path):
        return argument
    preset = PRESETS.parent / path
    if PRESETS in preset.parents and preset.is_file():
        return f"{flag}={preset}{colon}{rest}"
    return argument
