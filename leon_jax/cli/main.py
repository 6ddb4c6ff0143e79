"""The program `leon`: `leon COMMAND --flag=value ...`.

A command is a module of this package with a docstring, its own absl flags and `main(argv)`. It has
`rewritten(arguments)` if a flag changes others, and ARGUMENTS if it takes arguments that are no
flags. It is imported only when it is used, so `leon --help` is quick. A command uses absl's global
flags, or its own `FlagValues` called FLAGS, which lets several commands run in one process.

An error that the user can fix prints one sentence on stderr and exits with code 2. Ctrl-C exits
with code 130. A closed output pipe exits with code 141 and prints nothing, like other programs.
Characters that the terminal cannot show are printed as escapes.
"""

import contextlib
import difflib
import importlib
import inspect
import io
import os
import resource
import select
import sys
import traceback
import types
from collections.abc import Iterator, Sequence

from absl import flags

from leon_jax.cli import flag_errors
from leon_jax.cli.presets import find_preset
from leon_jax.config import UserError

# NumPy multiplies only small matrices here (augmentation, neighbours), and does so on several
# threads at once. More BLAS threads would only compete. NumPy reads the variable at import.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

VERBS = {
    "pipeline": "train everything from a folder of images: from data to a model folder",
    "generate": "generate images from a prompt, or a caption from an image",
    "prepare": "collect image-text pairs into a documents folder",
    "encode": "add codes, vectors and neighbours to a documents folder",
    "thresholds": "measure the near-copy thresholds of a retrieval encoder",
    "train": "train a tokenizer, an encoder or a decoder from a config file",
    "plan": "estimate memory and speed of a config on a TPU pod, without the pod",
    "export": "write a model folder from its parts, with a model card",
    "convert": "convert published weights to the format of leon_jax, and back",
    "evaluate": "evaluate a trained model on held-out documents",
    "report": "write a page of curves, differences and samples of training runs",
    "cache": "show or clear the cache of compiled programs and prepared folders",
    "doctor": "print versions, devices, extras, caches and settings, for a bug report",
    "demo": "run every step once on real data and write an HTML report",
}

USAGE = """\
leon: one transformer that reads and generates text and images.

usage: leon COMMAND [--flag=value ...]

{verbs}

leon COMMAND --help   describes a command and its flags
leon --version        prints the version

LEON_DEBUG=1 leon COMMAND ...   also prints the traceback of an error

for example: leon generate --prompt="cat face, Twemoji style" --num_images=4 --out=images"""

# 128 + SIGPIPE.
PIPE_CLOSED = 141


def main() -> None:
    """The console entry point."""
    streams = [s for s in (sys.stdout, sys.stderr) if isinstance(s, io.TextIOWrapper)]
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")
    try:
        try:
            code = run(sys.argv[1:])
        finally:  # flush here, so that a closed pipe raises here and not while Python exits
            for stream in streams:
                stream.flush()
    except BrokenPipeError:
        closed = [stream for stream in streams if _is_closed(stream)]
        if not closed:
            raise
        for stream in closed:  # Python flushes them again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        code = PIPE_CLOSED
    sys.exit(code)


def _is_closed(stream: io.TextIOWrapper) -> bool:
    """Returns whether the stream is a pipe whose reader has closed it."""
    poll = select.poll()
    poll.register(stream, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def run(arguments: Sequence[str]) -> int:
    """Runs one command and returns its exit code.

    Args:
      arguments: the command line after `leon`.
    """
    if not arguments or arguments[0] in ("--help", "-h", "-help", "help"):
        print(usage())
        return 0 if arguments else 2
    verb, *rest = arguments
    if verb in ("--version", "-V", "version"):
        print(version())
        return 0
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"the commands are {', '.join(VERBS)}"
        return _refuse("leon", f"there is no command {verb!r}; {hint}")
    return run_verb(verb, rest)


def run_verb(verb: str, arguments: Sequence[str]) -> int:
    """Parses a command's flags, runs its `main`, and returns the exit code."""
    name = f"leon {verb}"
    _allow_many_files()
    try:
        with _argv([name]):  # the definition of --config reads sys.argv
            module = importlib.import_module(f"leon_jax.cli.{verb}")
        if {"--help", "-h", "-help"} & set(arguments):
            print(describe(module, verb))
            return 0
        arguments = [*map(find_preset, map(_with_underscores, arguments))]
        if hasattr(module, "rewritten"):
            arguments = module.rewritten(arguments)
        positional = _parse(module, [name, *arguments])
        if len(positional) > 1 and not hasattr(module, "ARGUMENTS"):
            raise UserError(f"{positional[1]!r} is not a flag; flags are written --name=value")
        module.main(positional)
    except UserError as error:
        if os.environ.get("LEON_DEBUG"):
            traceback.print_exc()
        return _refuse(name, str(error))
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    return 0


def _parse(module: types.ModuleType, argv: list[str]) -> list[str]:
    """Sets a command's flags and returns the arguments that are not flags."""
    values = getattr(module, "FLAGS", flags.FLAGS)
    if values is not flags.FLAGS:
        # Reset the module's flags, since one process may run several commands. Mark absl's global
        # flags as parsed, because some libraries check.
        values.unparse_flags()
        for flag in values:
            values[flag].unparse()
        flags.FLAGS.mark_as_parsed()
    try:
        with _argv(argv):  # --config reads its overrides from sys.argv
            return values(argv)
    except UserError:
        raise
    except Exception as error:  # a config file is a program and may raise anything
        raise UserError(flag_errors.sentence(values, argv, error)) from error


@contextlib.contextmanager
def _argv(argv: list[str]) -> Iterator[None]:
    """Replaces `sys.argv` within the context."""
    previous, sys.argv = sys.argv, argv
    try:
        yield
    finally:
        sys.argv = previous


def _allow_many_files() -> None:
    """Raises the limit of open files to its maximum: a large prepared folder maps thousands."""
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS allows less than it reports
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))


def _with_underscores(argument: str) -> str:
    """Converts `--remove-keys=a-b` to `--remove_keys=a-b`, so that both spellings work."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def usage() -> str:
    """Returns the text of `leon --help`."""
    width = max(map(len, VERBS))
    return USAGE.format(verbs="\n".join(f"  {verb:{width}}  {VERBS[verb]}" for verb in VERBS))


def version() -> str:
    """Returns the text of `leon --version`."""
    from importlib import metadata

    import leon_jax

    return f"leon {leon_jax.__version__} (jax {metadata.version('jax')})"


def describe(module: types.ModuleType, verb: str) -> str:
    """Returns the text of `leon COMMAND --help`: the module's docstring, flags and defaults."""
    lines = [inspect.cleandoc(module.__doc__ or VERBS[verb]), ""]
    if arguments := getattr(module, "ARGUMENTS", ""):
        lines += [f"usage: leon {verb} {arguments} [--flag=value ...]", ""]
    lines.append(f"flags of leon {verb}:")
    values = getattr(module, "FLAGS", flags.FLAGS)
    for flag in sorted(values.get_flags_for_module(module.__name__), key=lambda f: f.name):
        has_default = flag.default not in (None, "", [])
        default = f" (default: {flag.default_as_str.strip("'")})" if has_default else ""
        # absl adds a sentence to flags that may be repeated; our help already says so.
        text = " ".join((flag.help or "").split()).partition("; repeat this option")[0]
        lines.append(f"  --{flag.name}: {text}{default}")
    return "\n".join(lines)


def _refuse(name: str, message: str) -> int:
    print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
