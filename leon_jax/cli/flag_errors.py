"""What is wrong with the flags of a command or with its config file, in one sentence of our own."""

import difflib
import os
import re
import traceback
from collections.abc import Sequence

from absl import flags

# How absl calls the kinds of values, and how we do.
_KINDS = {"an integer": "a whole number", "integer": "whole number"}


def sentence(values: flags.FlagValues, argv: Sequence[str], error: Exception) -> str:
    """What to tell the person.

    Args:
      values: the flags that were to be parsed.
      argv: what was parsed, the program's name first.
      error: what parsing raised.
    """
    if path := _config_path(argv):
        if said := _config_sentence(path, error):
            return said
        files = {os.path.basename(frame.filename) for frame in _frames(error)}
        if "config_path.py" in files and not isinstance(error, flags.Error):
            return _override_sentence(path, argv, str(error))
    if isinstance(error, flags.UnrecognizedFlagError):
        return _unknown_sentence(values, error.flagname)
    if isinstance(error, flags.IllegalFlagValueError):
        return _value_sentence(values, error)
    if missing := re.fullmatch(r"Missing value for flag (\S+)", str(error)):
        return f"{missing[1]} has no value; write {missing[1]}=VALUE"
    if taken := re.fullmatch(r"--no(\S+?)=.* does not take an argument", str(error), re.DOTALL):
        return f"--no{taken[1]} takes no value; write --no{taken[1]}, or --{taken[1]}=false"
    if order := re.match(r"Found (\S+) in argv before a value for --config", str(error)):
        return f"{order[1]} stands before --config; it must come after it"
    if again := re.match(r"Flag (\S+) is provided after (\S+) and", str(error)):
        return f"{again[1]} would undo {again[2]}, which stands before it; change their order"
    if isinstance(error, flags.CantOpenFlagFileError):
        return "the file that --flagfile names cannot be read"
    return "the flags cannot be read; --help shows how each is written"


def _config_sentence(path: str, error: BaseException | None) -> str | None:
    """What is wrong with a config file that raised an error when it was loaded; None: nothing.

    What the file's own lines raise is quoted; what a library raises is not. The flag raises errors
    of its own while it handles those of the file.
    """
    while error is not None:
        if isinstance(error, SyntaxError) and _is_same(error.filename or "", path):
            return f"the config file {path} has a syntax error in line {error.lineno}"
        frames = _frames(error)
        lines = [frame.lineno for frame in frames if _is_same(frame.filename, path)]
        if lines and isinstance(error, ModuleNotFoundError):
            return f"the config file {path} imports {error.name}, which is not installed"
        if lines:
            stop = f"the config file {path} stops in line {lines[-1]} with {type(error).__name__}"
            text = " ".join(map(str, error.args)).strip()
            own = _is_same(frames[-1].filename, path)
            return f"{stop}: {text}" if own and text else stop
        if isinstance(error, AttributeError) and error.name == "get_config":
            return f"the config file {path} has no function get_config"
        if isinstance(error, TypeError) and str(error).startswith("get_config()"):
            return f"get_config of {path} takes other arguments than the one after the colon"
        error = error.__context__
    return None


def _frames(error: BaseException) -> traceback.StackSummary:
    return traceback.extract_tb(error.__traceback__)


def _config_path(argv: Sequence[str]) -> str | None:
    """The file that --config names, without what its get_config is given after a colon."""
    for position, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            following = argv[position + 1] if position + 1 < len(argv) else ""
            return (value if equals else following).partition(":")[0] or None
    return None


def _is_same(filename: str, path: str) -> bool:
    return os.path.abspath(filename) == os.path.abspath(path)


def _override_sentence(path: str, argv: Sequence[str], message: str) -> str:
    keys = [found[1] for word in argv if (found := re.match(r"--(?:no)?config\.([^=]*)", word))]
    wrong = [key for key in keys if key and message.endswith(f" {key}")] or keys
    return f"--config.{wrong[0]} names no key that {path} could have"


def _unknown_sentence(values: flags.FlagValues, name: str) -> str:
    if name.startswith("config.") and "config" in values:
        return f"--{name} sets a key of the file that --config names, but --config is missing"
    known = [flag for flag in values if flag not in _ABSL]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean --{close[0]}?" if close else "--help shows all flags"
    return f"there is no flag --{name}; {hint}"


def _value_sentence(values: flags.FlagValues, error: flags.IllegalFlagValueError) -> str:
    written = re.match(r"flag --([^=]*)=(.*)", str(error), re.DOTALL)
    if written is None or written[1] not in values:
        return "a flag has a value that it cannot have; --help shows what each takes"
    # absl writes `flag --name=value: reason`, and raises it while it handles the reason.
    value = written[2].removesuffix(f": {error.__context__}")
    parser = values[written[1]].parser
    kind = getattr(parser, "syntactic_help", "")
    if isinstance(parser, flags.BooleanParser):
        wanted = "true or false"
    elif isinstance(parser, flags.EnumParser):
        wanted = f"one of {', '.join(parser.enum_values)}"
    elif kind:
        for theirs, ours in _KINDS.items():
            kind = kind.replace(theirs, ours)
        wanted = kind
    elif written[1].startswith("config."):
        wanted = "of the kind that it has in the config file"
    else:
        wanted = "of another kind; --help shows what it takes"
    return f"--{written[1]}={value} must be {wanted}"


# Flags that absl itself defines; nobody means them.
_ABSL = frozenset(flags.FLAGS) | {"flagfile", "undefok"}
