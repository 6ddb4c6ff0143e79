"""Writes one sentence about a mistake in the flags of a command or in its config file."""

import difflib
import os
import re
import traceback
from collections.abc import Sequence

from absl import flags

# absl's names of value types, and the names that our messages use.
_KINDS = {"an integer": "a whole number", "integer": "whole number"}


def sentence(values: flags.FlagValues, argv: Sequence[str], error: Exception) -> str:
    """Returns the error message for the user.

    Args:
      values: the flags of the command.
      argv: the command line; the program's name comes first.
      error: the exception that parsing raised.
    """
    if path := _config_path(argv):
        if message := _config_sentence(path, error):
            return message
        files = {os.path.basename(frame.filename) for frame in _frames(error)}
        if "config_path.py" in files and not isinstance(error, flags.Error):
            return _override_sentence(path, argv, str(error))
    if isinstance(error, flags.UnrecognizedFlagError):
        return _unknown_sentence(values, error.flagname)
    if isinstance(error, flags.IllegalFlagValueError):
        return _value_sentence(values, error)
    if missing := re.fullmatch(r"Missing value for flag (\S+)", str(error)):
        return f"{missing[1]} has no value; write {missing[1]}=VALUE"
    if negated := re.fullmatch(r"--no(\S+?)=.* does not take an argument", str(error), re.DOTALL):
        return f"--no{negated[1]} takes no value; write --no{negated[1]}, or --{negated[1]}=false"
    if early := re.match(r"Found (\S+) in argv before a value for --config", str(error)):
        return f"{early[1]} comes before --config; it must come after it"
    if late := re.match(r"Flag (\S+) is provided after (\S+) and", str(error)):
        return f"{late[1]} would override {late[2]}, which comes before it; swap them"
    if isinstance(error, flags.CantOpenFlagFileError):
        return "the file that --flagfile names cannot be read"
    return "the flags cannot be parsed; --help shows the form of each"


def _config_sentence(path: str, error: BaseException | None) -> str | None:
    """Returns the message for an error that the config file caused, else None.

    The message quotes an exception that the file itself raises, not one that a library raises. The
    file's exception may be in the context of another one, which the flag raised while handling it.
    """
    while error is not None:
        if isinstance(error, SyntaxError) and _is_same(error.filename or "", path):
            return f"the config file {path} has a syntax error in line {error.lineno}"
        frames = _frames(error)
        lines = [frame.lineno for frame in frames if _is_same(frame.filename, path)]
        if lines and isinstance(error, ModuleNotFoundError):
            return f"the config file {path} imports {error.name}, which is not installed"
        if lines:
            sentence = f"the config file {path} fails in line {lines[-1]}: {type(error).__name__}"
            text = " ".join(map(str, error.args)).strip()
            is_from_file = _is_same(frames[-1].filename, path)
            return f"{sentence}: {text}" if is_from_file and text else sentence
        if isinstance(error, AttributeError) and error.name == "get_config":
            return f"the config file {path} has no function get_config"
        if isinstance(error, TypeError) and str(error).startswith("get_config()"):
            return f"get_config of {path} needs --config={path}:ARGUMENT, or takes no argument"
        error = error.__context__
    return None


def _frames(error: BaseException) -> traceback.StackSummary:
    return traceback.extract_tb(error.__traceback__)


def _config_path(argv: Sequence[str]) -> str | None:
    """Returns the path in --config, without the argument of get_config after a colon."""
    for position, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            following = argv[position + 1] if position + 1 < len(argv) else ""
            return (value if equals else following).partition(":")[0] or None
    return None


def _is_same(filename: str, path: str) -> bool:
    return os.path.abspath(filename) == os.path.abspath(path)


def _override_sentence(path: str, argv: Sequence[str], message: str) -> str:
    matches = (re.match(r"--(?:no)?config\.([^=]*)", argument) for argument in argv)
    keys = [match[1] for match in matches if match]
    if missing := re.search(r"'(\w+)'", message):  # a KeyError of the library
        for key in keys:
            if missing[1] in key.split(".")[:-1]:
                return (
                    f"--config.{key} sets a key of the group {missing[1]}, which {path} does not "
                    "have; add the group to a copy of the file"
                )
    wrong_keys = [key for key in keys if key and message.endswith(f" {key}")] or keys
    return f"--config.{wrong_keys[0]} is not a key of {path}"


def _unknown_sentence(values: flags.FlagValues, name: str) -> str:
    if name.startswith("config.") and "config" in values:
        return f"--{name} sets a key of the config file, but --config is missing"
    own_flags = [flag for flag in values if flag not in _ABSL]
    close = difflib.get_close_matches(name, own_flags, n=1)
    hint = f"did you mean --{close[0]}?" if close else "--help shows all flags"
    return f"there is no flag --{name}; {hint}"


def _value_sentence(values: flags.FlagValues, error: flags.IllegalFlagValueError) -> str:
    match = re.match(r"flag --([^=]*)=(.*)", str(error), re.DOTALL)
    if match is None or match[1] not in values:
        return "a flag has an invalid value; --help shows the values of each"
    # absl writes `flag --name=value: reason`, where the reason is the context's message.
    name, value = match[1], match[2].removesuffix(f": {error.__context__}")
    parser = values[name].parser
    expected = getattr(parser, "syntactic_help", "")
    if isinstance(parser, flags.BooleanParser):
        expected = "true or false"
    elif isinstance(parser, flags.EnumParser):
        expected = f"one of {', '.join(parser.enum_values)}"
    elif expected:
        for absl_name, our_name in _KINDS.items():
            expected = expected.replace(absl_name, our_name)
    elif name.startswith("config."):
        expected = "of the type that the key has in the config file"
    else:
        expected = "of another type; --help shows it"
    return f"--{name}={value} must be {expected}"


# Flags that absl itself defines. Suggestions leave them out.
_ABSL = frozenset(flags.FLAGS) | {"flagfile", "undefok"}
