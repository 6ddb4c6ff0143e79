"""Shows what is kept between commands and how large it is, and empties it.

    leon cache
    leon cache --clear
    leon cache --clear --workdir=runs/emoji/decoder

Compiled programs are kept, so that the next command need not compile them again, and so are the
documents that were prepared for a model that had none to retrieve from. All of it is made again
when it is needed. It lies in the folder that LEON_CACHE names, or in ~/.cache/leon_jax. Compiled
programs take 5 GB at most, or what LEON_CACHE_LIMIT says, for example 500MB; those that were not
used for longest are removed first.
"""

import pathlib

from absl import flags

from leon_jax import compilation_cache
from leon_jax.config import UserError

FLAGS = flags.FlagValues()
_CLEAR = flags.DEFINE_bool("clear", False, "Remove the compiled programs.", flag_values=FLAGS)
_CLEAR_ALL = flags.DEFINE_bool(
    "clear_all", False, "Remove the compiled programs and what was prepared.", flag_values=FLAGS
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "A training run; its compiled programs are meant instead.", flag_values=FLAGS
)


def main(argv: list[str]) -> None:
    """Runs `leon cache`.

    Raises:
      UserError: flags contradict each other, the run does not exist, or something cannot be
        removed.
    """
    del argv
    if _WORKDIR.value is None:
        compiled, prepared = compilation_cache.compiled_folder(), _prepared()
    else:
        if _CLEAR_ALL.value:
            raise UserError("--clear_all is for what is kept for all commands; give --clear")
        workdir = pathlib.Path(_WORKDIR.value)
        if not workdir.is_dir():
            raise UserError(f"--workdir={workdir} is no folder; it must be that of a training run")
        compiled, prepared = workdir / compilation_cache.RUN_FOLDER, {}
    if _CLEAR.value or _CLEAR_ALL.value:
        removed = compilation_cache.clear(compiled)
        print(f"removed {_megabytes(removed)} of compiled programs from {compiled}")
        for path in prepared if _CLEAR_ALL.value else ():
            print(f"removed {_megabytes(compilation_cache.remove(path))}: {path}")
        return
    rows = [("compiled programs", compiled)]
    rows += [(what, path) for path, what in prepared.items()]
    sizes = [compilation_cache.size(path) for _, path in rows]
    width = max(len(what) for what, _ in rows)
    for (what, path), taken in zip(rows, sizes, strict=True):
        print(f"{what:{width}}  {_megabytes(taken):>12}  {path}")
    print(f"{'together':{width}}  {_megabytes(sum(sizes)):>12}")
    print(f"compiled programs may take {_megabytes(compilation_cache.limit())}")


def _prepared() -> dict[pathlib.Path, str]:
    """The folders of the cache that `leon` prepared, and what each holds."""
    folder = compilation_cache.cache_folder()
    found = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if (path / "manifest.json").is_file():
            found[path] = "prepared documents"
        elif path.name.lstrip(".").startswith("emoji"):
            found[path] = "emoji images"
    return found


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
