"""The `leon` command: `leon VERB --flag=value ...`.

A verb is a module of this package with a docstring, its own absl flags and `main(argv)`. It is
imported only when it is used, so `leon --help` is quick. Its flags are absl's global ones, or a
`FlagValues` of its own called FLAGS, so that several verbs can be used in one process. What a
person can fix is one sentence on stderr and exit code 2; Ctrl-C is exit code 130. Characters that a
terminal cannot show are printed as escapes. A reader that closes the pipe ends the command quietly,
with exit code 141, as the shell reports it of other programs.
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
from leon_jax.config import UserError

# NumPy multiplies only small matrices here (augmentation, neighbours), on threads that already run
# side by side; BLAS threads of its own would make each of them wait. Read when NumPy is loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

VERBS = {
    "generate": "generate images for a prompt, or write a caption for an image",
    "prepare": "make the folder of images and texts that training and retrieval read",
    "train": "train a tokenizer, an encoder or a decoder from a config file",
    "plan": "check a config against a TPU pod that is not there",
    "evaluate": "measure a trained model",
    "cache": "show what is kept between commands, and empty it",
    "demo": "run everything once on real data, and leave a page to look at",
}

USAGE = """\
leon: one transformer that reads and writes text and images.

usage: leon VERB [--flag=value ...]

{verbs}

leon VERB --help   says what a verb does and what its flags are
leon --version     prints the version

LEON_DEBUG=1 leon VERB ...   also shows where in the program an error comes from

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
        finally:  # what is still in the buffer is written here, not while Python ends
            for stream in streams:
                stream.flush()
    except BrokenPipeError:
        closed = [stream for stream in streams if _is_closed(stream)]
        if not closed:
            raise
        for stream in closed:  # Python flushes them once more when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        code = PIPE_CLOSED
    sys.exit(code)


def _is_closed(stream: io.TextIOWrapper) -> bool:
    """Whether the stream is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(stream, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def run(arguments: Sequence[str]) -> int:
    """Runs one command and returns its exit code.

    Args:
      arguments: what stands after `leon` on the command line.
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
        hint = f"did you mean {close[0]!r}?" if close else f"the verbs are {', '.join(VERBS)}"
        return _refuse("leon", f"there is no verb {verb!r}; {hint}")
    return run_verb(verb, rest)


def run_verb(verb: str, arguments: Sequence[str]) -> int:
    """Parses a verb's flags, runs its `main`, and turns errors into messages and exit codes."""
    name = f"leon {verb}"
    _allow_many_files()
    try:
        with _argv([name]):  # the definition of --config reads it
            module = importlib.import_module(f"leon_jax.cli.{verb}")
        if {"--help", "-h", "-help"} & set(arguments):
            print(describe(module, verb))
            return 0
        rest = _parse(module, [name, *map(_with_underscores, arguments)])
        if len(rest) > 1:
            raise UserError(f"{rest[1]!r} is not a flag; flags are written --name=value")
        module.main(rest)
    except UserError as error:
        if os.environ.get("LEON_DEBUG"):
            traceback.print_exc()
        return _refuse(name, str(error))
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    return 0


def _parse(module: types.ModuleType, argv: list[str]) -> list[str]:
    """Sets a verb's flags, and returns what is no flag."""
    values = getattr(module, "FLAGS", flags.FLAGS)
    if values is not flags.FLAGS:
        # Flags of the module's own start anew with every command of a process. The global ones
        # count as parsed, for the libraries that ask.
        values.unparse_flags()
        for flag in values:
            values[flag].unparse()
        flags.FLAGS.mark_as_parsed()
    try:
        with _argv(argv):  # the overrides of a config's keys are looked for in there
            return values(argv)
    except UserError:
        raise
    except Exception as error:  # a config file is a program and may raise anything
        raise UserError(flag_errors.sentence(values, argv, error)) from error


@contextlib.contextmanager
def _argv(argv: list[str]) -> Iterator[None]:
    """Makes `argv` the command line of this process for a while."""
    previous, sys.argv = sys.argv, argv
    try:
        yield
    finally:
        sys.argv = previous


def _allow_many_files() -> None:
    """Raises the limit of open files as far as it goes: a large prepared folder maps thousands."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS allows less than it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _with_underscores(argument: str) -> str:
    """`--remove-keys=a-b` as `--remove_keys=a-b`: both spellings of a flag are understood."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def usage() -> str:
    """What `leon --help` prints."""
    width = max(map(len, VERBS))
    return USAGE.format(verbs="\n".join(f"  {verb:{width}}  {VERBS[verb]}" for verb in VERBS))


def version() -> str:
    """What `leon --version` prints."""
    from importlib import metadata

    import leon_jax

    return f"leon {leon_jax.__version__} (jax {metadata.version('jax')})"


def describe(module: types.ModuleType, verb: str) -> str:
    """What `leon VERB --help` prints: the module's docstring and its flags with their defaults."""
    lines = [inspect.cleandoc(module.__doc__ or VERBS[verb]), "", f"flags of leon {verb}:"]
    values = getattr(module, "FLAGS", flags.FLAGS)
    for flag in sorted(values.get_flags_for_module(module.__name__), key=lambda f: f.name):
        default = "" if flag.default is None else f" (default: {flag.default_as_str.strip("'")})"
        lines.append(f"  --{flag.name}: {' '.join((flag.help or '').split())}{default}")
    return "\n".join(lines)


def _refuse(name: str, message: str) -> int:
    print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
