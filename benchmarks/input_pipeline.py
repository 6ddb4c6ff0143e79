#!/usr/bin/env python3
"""Benchmarks the input pipeline in tokens per second, and writes docs/input_pipeline.md.

    python -m benchmarks.input_pipeline --folder=out/input_pipeline

The first run writes the documents into the folder, which takes some minutes and 2.5 GB. Then the
benchmark times `DecoderProgram.batches` of configs/cm3leon_350m.py, as the training loop reads it.
Measurements during which other programs used the CPU do not count (see `benchmarks/quiet.py`).
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

from benchmarks import image_feed, input_data
from benchmarks.input_reader import ALLOWED, ROOT, STAGES, Case, Reader
from benchmarks.quiet import Watch, wait
from leon_jax.train.peak_flops import CHIPS

MFU, CHIPS_OF_A_HOST = 0.6, 4
DELAY, COLD_THREADS = 0.02, 8
NAMES = {"codes": "codes", "pictures": "codes and images"}
LINES = (
    Case(),
    Case(records="pictures"),
    Case(packing="stream"),
    Case(packing="stream", retrieved=3),
    Case(packing="stream", retrieved=3, records="pictures"),
)

PAGE = """\
# The input pipeline

```bash
python -m benchmarks.input_pipeline
```

The benchmark measures how fast the decoder's training data is read, encoded, masked, packed and
batched. It times `DecoderProgram.batches` of `configs/cm3leon_350m.py` (rows of 4,096 tokens,
images of 1,024), as the training loop reads it.

{machine}.

The numbers are medians of {rounds} measurements of {seconds:g} s. Other programs used at most
{others} of the CPU. There are {documents:,} documents with captions of 20 to 60 tokens. A document
has {tokens:,.0f} tokens, with the codes of its image. Retrieved documents are sampled from all of
them. Nothing is cached: every document of an example costs a read and an encoding.

## One core

The process and all its threads run on one core. Tokens are targets; padding does not count.

{one_core}

A v5p host with {chips} chips that trains the 350M model at {mfu} MFU consumes {needed} million
tokens a second. So one core and Python threads are enough. No other processes are used.

## Where the time goes

The table shows the microseconds that an example (a query and two retrieved documents) takes, for
the first two rows above, without threads. The times include the cost of the timers.

{stages}

## More cores

Python threads take turns, and switching costs time. So a second core does not help. More threads
help only with slow storage (below). This is the first row of the first table on {cores} cores:

{threads}

## Slow storage

A thread that waits for a record does not block the others. Here every record takes {delay} ms
longer, on one core. An example needs three records, one after the other. Set `data.threads` to the
number of records needed a second, times the seconds that one record takes. The number may change
when a run continues.

{late}

## Images beside the codes

A record is read as a whole. If it has an image beside the codes, training reads both, but needs
the codes only: {codes_bytes:,.0f} of {pictures_bytes:,.0f} bytes. In memory, the cost is the
difference in the first table. On any other storage the cost is the bytes: {pictures_rate:.0f} MB
for a million tokens, instead of {codes_rate:.1f} MB. In this measurement the file is not in memory
at the start ({cold_threads} threads, {cores} cores, the disk of this machine):

{cold}

So `leon encode` writes records with codes only. The images stay in the documents folder.
"""


class Busy(Exception):
    """Other programs use the machine."""


@dataclasses.dataclass
class Measure:
    """Medians of undisturbed measurements.

    Attributes:
      options: the command line.
      others: the largest share of the CPU that other programs used during a measurement.
    """

    options: argparse.Namespace
    others: float = 0.0

    def speed(self, case: Case) -> tuple[float, float, float]:
        """See `Reader.speed`.

        Raises:
          Busy: other programs used the machine.
        """
        with contextlib.closing(Reader(self.options.folder, case)) as reader:
            results = self._quiet(lambda: reader.speed(self.options.seconds))
        speed, padding, busy = (statistics.median(column) for column in zip(*results, strict=True))
        spread = f"{min(results)[0]:,.0f} to {max(results)[0]:,.0f}"
        log(f"{case}: {speed:,.0f} tokens/s ({spread}), {busy:.2f} cores, {padding:.3f} padding")
        return speed, padding, busy

    def stages(self, case: Case) -> dict[str, float]:
        """See `Reader.stages`.

        Raises:
          Busy: other programs used the machine.
        """
        with contextlib.closing(Reader(self.options.folder, case)) as reader:
            results = self._quiet(lambda: reader.stages(2))
        medians = {
            stage: statistics.median(result[stage] for result in results) for stage in STAGES
        }
        log(f"{case}: {sum(medians.values()):.0f} us an example")
        return medians

    def _quiet[T](self, measure: Callable[[], T]) -> list[T]:
        results: list[T] = []
        for _ in range(5 * self.options.rounds):
            if not wait(self.options.noise, self.options.patience):
                break
            watch = Watch(())
            result, others = measure(), watch.others()
            if others <= self.options.noise:
                self.others = max(self.others, others)
                results.append(result)
            if len(results) == self.options.rounds:
                return results
        raise Busy("other programs use this machine; end them, or see --noise")


def table(head: list[str], rows: list[list[str]]) -> str:
    """Returns a Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def million(speed: float) -> str:
    return f"{speed / 1e6:.2f}"


def one_core(measure: Measure) -> str:
    rows = []
    for case in LINES:
        results = [measure.speed(dataclasses.replace(case, threads=n)) for n in (0, 1, 4)]
        speeds = [million(speed) for speed, _, _ in results]
        padding = percent(results[-1][1])
        rows.append([NAMES[case.records], str(case.retrieved), case.packing, *speeds, padding])
    head = ["records hold", "retrieved", "`data.packing`", "million tokens/s without threads"]
    return table([*head, "1 thread", "4 threads", "padding"], rows)


def stages(measure: Measure) -> str:
    results = [measure.stages(Case(records=name)) for name in NAMES]
    totals = [sum(result.values()) for result in results]
    rows = []
    for stage, description in STAGES.items():
        cells = []
        for result, total in zip(results, totals, strict=True):
            cells += [f"{result[stage]:.0f}", percent(result[stage] / total)]
        rows.append([stage, description, *cells])
    rows.append(["all", "", f"{totals[0]:.0f}", "", f"{totals[1]:.0f}", ""])
    return table(["stage", "", "codes", "share", "codes and images", "share"], rows)


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
    for name, description in NAMES.items():
        case = Case(records=name, threads=COLD_THREADS, cores=len(ALLOWED), cold=True)
        speed, _, busy = measure.speed(case)
        rows.append([description, million(speed), f"{busy:.2f}"])
    return table(["records hold", "million tokens/s", "cores busy"], rows)


def page(measure: Measure) -> str:
    """Runs all measurements and returns the page."""
    options = measure.options
    reader = Reader(options.folder, Case())
    sizes = {name: reader.file(name).stat().st_size / options.documents for name in NAMES}
    chip = next(chip for chip in CHIPS if chip.name == "v5p")
    required_speed = MFU * CHIPS_OF_A_HOST * chip.flops / reader.program.flops_per_token
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
        needed=million(required_speed),
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
    """Returns the processor and the versions of the packages that do the work."""
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    processor = next(
        line.partition(":")[2].strip() for line in lines if line.startswith("model name")
    )
    packages = ("grain", "array_record", "tokenizers", "msgpack", "numpy")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return f"{processor}, {len(ALLOWED)} cores; Python {platform.python_version()}, {versions}"


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--folder", type=pathlib.Path, required=True, help="folder for the documents"
    )
    parser.add_argument("--documents", type=int, default=20_000, help="number of documents")
    parser.add_argument("--seconds", type=float, default=2, help="duration of a measurement")
    parser.add_argument("--rounds", type=int, default=5, help="measurements per number")
    parser.add_argument(
        "--noise", type=float, default=0.03, help="share of the CPU that other programs may use"
    )
    parser.add_argument(
        "--patience", type=float, default=600, help="seconds to wait for a quiet machine"
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=ROOT / "docs" / "input_pipeline.md",
        help="the page to write",
    )
    options = parser.parse_args()
    input_data.write(options.folder, options.documents)
    try:
        text = page(Measure(options))
    except Busy as error:
        sys.exit(str(error))
    # benchmarks/image_feed.py writes the rest of the page.
    _, heading, images = options.out.read_text().partition(f"\n{image_feed.HEADING}\n")
    temporary = options.out.with_name(options.out.name + ".tmp")
    temporary.write_text(text + heading + images)
    temporary.replace(options.out)


if __name__ == "__main__":
    main()
