"""Shows the size of the cache, or clears it.

    leon cache
    leon cache --clear
    leon cache --clear --workdir=runs/emoji/decoder

The cache has compiled programs, so that the next command starts without compiling. It also has the
prepared folder of the emoji, the models that were unpacked from .tar files, and copies of what was
read from buckets. Everything in it is rebuilt when needed.

The cache is the folder LEON_CACHE, by default ~/.cache/leon_jax. Compiled programs take at most
5 GB, or LEON_CACHE_LIMIT, for example 500MB. The least recently used programs are removed first.
"""

import pathlib

from absl import flags

from leon_jax import compilation_cache
from leon_jax.config import UserError

FLAGS = flags.FlagValues()
_CLEAR = flags.DEFINE_bool("clear", False, "Remove the compiled programs.", flag_values=FLAGS)
_CLEAR_ALL = flags.DEFINE_bool(
    "clear_all", False,
    "Remove the compiled programs, prepared folders, unpacked models and copies from buckets.",
    flag_values=FLAGS,
)  # fmt: skip
# `leon_jax.model_archive.CACHE`, whose module would make --help slow.
_MODELS = "models"
# `leon_jax.storage.CACHE`.
_BUCKETS = "buckets"
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Use the compiled programs of this training run instead.", flag_values=FLAGS
)


def main(argv: list[str]) -> None:
    """Runs `leon cache`.

    Raises:
      UserError: the flags contradict each other, the run does not exist, or a folder cannot be
        removed.
    """
    del argv
    if _WORKDIR.value is None:
        compiled, prepared = compilation_cache.compiled_folder(), prepared_folders()
    else:
        if _CLEAR_ALL.value:
            raise UserError("--clear_all cannot be used with --workdir; use --clear")
        workdir = pathlib.Path(_WORKDIR.value)
        if not workdir.is_dir():
            raise UserError(f"--workdir={workdir} is not a folder; it must be a training run's")
        compiled, prepared = workdir / compilation_cache.RUN_FOLDER, {}
    if _CLEAR.value or _CLEAR_ALL.value:
        removed = compilation_cache.clear(compiled)
        print(f"removed {_megabytes(removed)} of compiled programs from {compiled}")
        for path in prepared if _CLEAR_ALL.value else ():
            print(f"removed {_megabytes(compilation_cache.remove(path))}: {path}")
        return
    rows = [("compiled programs", compiled)]
    rows += [(contents, path) for path, contents in prepared.items()]
    sizes = [compilation_cache.size(path) for _, path in rows]
    width = max(len(contents) for contents, _ in rows)
    for (contents, path), size in zip(rows, sizes, strict=True):
        print(f"{contents:{width}}  {_megabytes(size):>12}  {path}")
    print(f"{'total':{width}}  {_megabytes(sum(sizes)):>12}")
    print(f"limit of compiled programs: {_megabytes(compilation_cache.limit())}")


def prepared_folders() -> dict[pathlib.Path, str]:
    """Returns the cache's other folders and a description of each one's contents."""
    folder = compilation_cache.cache_folder()
    contents = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if (path / "manifest.json").is_file():
            contents[path] = "prepared folder"
        elif path.name.lstrip(".").startswith("emoji"):
            contents[path] = "emoji images"
        elif path.name == _MODELS:
            contents[path] = "unpacked models"
        elif path.name == _BUCKETS:
            contents[path] = "copies from buckets"
    return contents


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
