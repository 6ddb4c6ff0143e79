#!/usr/bin/env python3
"""Writes docs/input_pipeline.md: tokens a second that one core reads, encodes, masks and packs.

    python -m benchmarks.input_pipeline --folder=out/input_pipeline

The first time it writes the documents into the folder, which takes some minutes and 2.5 GB. What is
timed is `DecoderProgram.batches` of configs/cm3leon_350m.py, as the training loop reads it.
Measurements during which other programs used the CPU do not count (`benchmarks/quiet.py` says why).
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import pathlib
import platform
import statistics
import sys
from collections.abc import Callable

from benchmarks import input_data
from benchmarks.input_reader import ALLOWED, ROOT, STAGES, Case, Reader
from benchmarks.quiet import Watch, wait
from leon_jax.train.peak_flops import CHIPS

MFU, CHIPS_OF_A_HOST = 0.6, 4
DELAY, COLD_THREADS = 0.02, 8
NAMES = {"codes": "codes", "pictures": "codes and pictures"}
LINES = (
    Case(),
    Case(records="pictures"),
    Case(packing="stream"),
    Case(packing="stream", retrieved=3),
    Case(packing="stream", retrieved=3, records="pictures"),
)

PAGE = """\
# The input pipeline

How fast the decoder's training data are read, encoded, masked, packed and batched. Made by
`python -m benchmarks.input_pipeline`, which times `DecoderProgram.batches` of
`configs/cm3leon_350m.py` (rows of 4,096 tokens, pictures of 1,024) as the training loop reads it.

{machine}.

Medians of {rounds} measurements of {seconds:g} s, during which other programs used at most {others}
of the CPU. {documents:,} documents with captions of 20 to 60 tokens, {tokens:,.0f} tokens each with
the picture's codes. Retrieved documents are drawn from anywhere among them, and nothing read is
kept for later: every document that an example shows costs a read and an encoding.

## One core

The process and all its threads are kept on one core. Tokens are targets; padding does not count.

{one_core}

A v5p host with {chips} chips that trains the 350M model at {mfu} MFU takes {needed} million tokens
a second. So one core and Python's threads are enough, and nothing is done in other processes.

## Where the time goes

Microseconds an example (a query and two retrieved documents) of the first two lines above, without
threads. Stopwatches are part of it.

{stages}

## More cores

Python's threads take turns and lose time handing over, so a second core does not help, and several
threads are for waiting (below). The first line of the first table on {cores} cores:

{threads}

## Storage that answers late

A thread that waits for a record holds up no other. Here every record comes {delay} ms later, on one
core; an example needs three, one after the other. `data.threads` has to be the number of records
wanted in a second, times the seconds that one takes; a run may go on with another number.

{late}

## Pictures beside the codes

`leon prepare` keeps a picture and its codes in one record, and a record is read whole. Training
wants the codes only: {codes_bytes:,.0f} of {pictures_bytes:,.0f} bytes. From memory that costs what
the first table says; from anywhere else it costs the bytes, {pictures_rate:.0f} MB instead of
{codes_rate:.1f} for a million tokens. Here the file is not in memory when a measurement begins
({cold_threads} threads, {cores} cores, this machine's disk):

{cold}

A layout with the pictures in a file of their own, row for row, would read the codes alone; only
preparing a folder and looking at it need the pictures.
"""


class Busy(Exception):
    """Other programs use the machine."""


@dataclasses.dataclass
class Measure:
    """Medians of measurements that nothing disturbed.

    Attributes:
      options: the command line.
      others: the largest share of the CPU that other programs used while one was made.
    """

    options: argparse.Namespace
    others: float = 0.0

    def speed(self, case: Case) -> tuple[float, float, float]:
        """See `Reader.speed`.

        Raises:
          Busy: there was no quiet.
        """
        with contextlib.closing(Reader(self.options.folder, case)) as reader:
            found = self._quiet(lambda: reader.speed(self.options.seconds))
        speed, padding, busy = (statistics.median(column) for column in zip(*found, strict=True))
        spread = f"{min(found)[0]:,.0f} to {max(found)[0]:,.0f}"
        say(f"{case}: {speed:,.0f} tokens/s ({spread}), {busy:.2f} cores, {padding:.3f} padding")
        return speed, padding, busy

    def stages(self, case: Case) -> dict[str, float]:
        """See `Reader.stages`.

        Raises:
          Busy: there was no quiet.
        """
        with contextlib.closing(Reader(self.options.folder, case)) as reader:
            found = self._quiet(lambda: reader.stages(2))
        medians = {stage: statistics.median(each[stage] for each in found) for stage in STAGES}
        say(f"{case}: {sum(medians.values()):.0f} us an example")
        return medians

    def _quiet[T](self, measure: Callable[[], T]) -> list[T]:
        found: list[T] = []
        for _ in range(5 * self.options.rounds):
            if not wait(self.options.noise, self.options.patience):
                break
            watch = Watch(())
            result, others = measure(), watch.others()
            if others <= self.options.noise:
                self.others = max(self.others, others)
                found.append(result)
            if len(found) == self.options.rounds:
                return found
        raise Busy("other programs use this machine; end them, or see --noise")


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def million(speed: float) -> str:
    return f"{speed / 1e6:.2f}"


def one_core(measure: Measure) -> str:
    rows = []
    for case in LINES:
        found = [measure.speed(dataclasses.replace(case, threads=n)) for n in (0, 1, 4)]
        speeds = [million(speed) for speed, _, _ in found]
        padding = percent(found[-1][1])
        rows.append([NAMES[case.records], str(case.retrieved), case.packing, *speeds, padding])
    head = ["records hold", "retrieved", "`data.packing`", "million tokens/s without threads"]
    return table([*head, "1 thread", "4 threads", "padding"], rows)


def stages(measure: Measure) -> str:
    found = [measure.stages(Case(records=name)) for name in NAMES]
    totals = [sum(each.values()) for each in found]
    rows = []
    for stage, what in STAGES.items():
        cells = []
        for each, total in zip(found, totals, strict=True):
            cells += [f"{each[stage]:.0f}", percent(each[stage] / total)]
        rows.append([stage, what, *cells])
    rows.append(["all", "", f"{totals[0]:.0f}", "", f"{totals[1]:.0f}", ""])
    return table(["stage", "", "codes", "share", "codes and pictures", "share"], rows)


def threads(measure: Measure) -> str:
    rows = []
    for count in (1, 2, 4, 8):
        speed, _, busy = measure.speed(Case(threads=count, cores=len(ALLOWED)))
        rows.append([str(count), million(speed), f"{busy:.2f}"])
    return table(["threads", "million tokens/s", "cores busy"], rows)


def late(measure: Measure) -> str:
    rows = []
    for count in (2, 8, 32, 128):
        speed, _, busy = measure.speed(Case(threads=count, delay=DELAY))
        rows.append([str(count), million(speed), f"{busy:.2f}"])
    return table(["threads", "million tokens/s", "cores busy"], rows)


def cold(measure: Measure) -> str:
    rows = []
    for name, words in NAMES.items():
        case = Case(records=name, threads=COLD_THREADS, cores=len(ALLOWED), cold=True)
        speed, _, busy = measure.speed(case)
        rows.append([words, million(speed), f"{busy:.2f}"])
    return table(["records hold", "million tokens/s", "cores busy"], rows)


def page(measure: Measure) -> str:
    """Everything, measured and written down."""
    options = measure.options
    reader = Reader(options.folder, Case())
    sizes = {name: reader.file(name).stat().st_size / options.documents for name in NAMES}
    chip = next(chip for chip in CHIPS if chip.name == "v5p")
    needed = MFU * CHIPS_OF_A_HOST * chip.flops / reader.program.flops_per_token
    tables = {part.__name__: part(measure) for part in (one_core, stages, threads, late, cold)}
    return PAGE.format(
        machine=machine(),
        rounds=options.rounds,
        seconds=options.seconds,
        others=percent(measure.others),
        documents=options.documents,
        tokens=reader.tokens,
        chips=CHIPS_OF_A_HOST,
        mfu=f"{100 * MFU:.0f} %",
        needed=million(needed),
        cores=len(ALLOWED),
        delay=f"{1000 * DELAY:.0f}",
        codes_bytes=sizes["codes"],
        pictures_bytes=sizes["pictures"],
        codes_rate=sizes["codes"] / reader.tokens,
        pictures_rate=sizes["pictures"] / reader.tokens,
        cold_threads=COLD_THREADS,
        **tables,
    )


def machine() -> str:
    """The processor, and the versions of what does the work."""
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    packages = ("grain", "array_record", "tokenizers", "msgpack", "numpy")
    versions = ", ".join(f"{each} {importlib.metadata.version(each)}" for each in packages)
    return f"{name}, {len(ALLOWED)} cores; Python {platform.python_version()}, {versions}"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="for the documents")
    parser.add_argument("--documents", type=int, default=20_000, help="how many")
    parser.add_argument("--seconds", type=float, default=2, help="of a measurement")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of a figure")
    parser.add_argument(
        "--noise", type=float, default=0.03, help="share of the CPU that others may use"
    )
    parser.add_argument(
        "--patience", type=float, default=600, help="seconds to wait for that, before a measurement"
    )
    parser.add_argument(
        "--out", type=pathlib.Path, default=ROOT / "docs" / "input_pipeline.md", help="the page"
    )
    options = parser.parse_args()
    input_data.write(options.folder, options.documents)
    try:
        text = page(Measure(options))
    except Busy as error:
        sys.exit(str(error))
    temporary = options.out.with_name(options.out.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(options.out)


if __name__ == "__main__":
    main()
