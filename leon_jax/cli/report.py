"""Writes one page about training runs, which may go on meanwhile.

    leon report runs/emoji/decoder --out=out/report
    leon report runs/one runs/other --out=out/report

The page index.html needs no network. It has curves of the losses, the held-out losses, the learning
rate, the gradient norm, the speed and the goodput; the wall time by what it was spent on; the
differences of the configs; the times of the hosts; the operations that take most of the time of
each profile (config.loop.profile of leon train; needs xprof); and sample images over time.
"""

import pathlib

from absl import flags

from leon_jax.config import UserError

FLAGS = flags.FlagValues()
_OUT = flags.DEFINE_string("out", None, "The folder for index.html.", flag_values=FLAGS)

# What may stand beside flags; see leon_jax.cli.main.
ARGUMENTS = "WORKDIR..."


def main(argv: list[str]) -> None:
    """Runs `leon report`.

    Raises:
      UserError: no workdir is given, a folder holds no run, or the page cannot be written.
    """
    from leon_jax import storage

    # The page needs no weights.
    folders = [storage.local(argument, without="checkpoints") for argument in argv[1:]]
    if not folders:
        raise UserError("name at least one workdir of leon train, for example runs/emoji/decoder")
    if not _OUT.value:
        raise UserError("--out is missing; for example --out=out/report")
    from leon_jax.report import page, profile_section, runs

    out = pathlib.Path(_OUT.value)
    try:
        read = runs.read(folders)
        page.write(read, out, profile_section.sections(read))
    except OSError as error:
        raise UserError(f"{error.filename or out} cannot be used: {error.strerror}") from error
    print(f"wrote {out / 'index.html'}")
