#!/usr/bin/env python3
"""Benchmarks decoding: our engine against `generate` of transformers in PyTorch.

    python -m benchmarks.decode --shape=10m --shape=125m --out=docs/decode_speed.md

Both sides continue the same prompts greedily with the same weights, with and without
classifier-free guidance. First their output ids are compared. They are two processes that take
turns on one machine. Rounds in which other programs used the CPU do not count (see
`benchmarks/quiet.py`). Times include the prefill and the transfer of ids to the host, but not
compilation.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import statistics
import sys
import tempfile

from benchmarks.quiet import Noisy, rounds
from benchmarks.shapes import SHAPES, Shape
from benchmarks.turns import ROOT, Worker

GUIDANCE = 3.0
AGREE = 16  # ids that must be equal; later ones may differ if two logits are nearly equal


class Unequal(Exception):
    """The two sides cannot be compared."""


@dataclasses.dataclass
class Cell:
    """One setting and its measurements.

    Attributes:
      batch: prompts in a batch.
      new: new ids per prompt.
      guided: whether guidance is on.
      ours, theirs: tokens per second in each round.
      others: the largest share of the CPU that other programs used in a round.
    """

    batch: int
    new: int
    guided: bool
    ours: list[float] = dataclasses.field(default_factory=list)
    theirs: list[float] = dataclasses.field(default_factory=list)
    others: float = 0.0

    def read_bytes(self, shape: Shape, prompt: int, width: int) -> float:
        """Returns the bytes that a step must read: the weights once, and the cache of every row."""
        weights = shape.layers * (4 * shape.embed**2 + 2 * shape.embed * shape.mlp)
        weights += shape.vocab * shape.embed
        slots = prompt + self.new / 2  # on average
        cache = 2 * shape.layers * shape.embed * slots * self.batch * (2 if self.guided else 1)
        return width * (weights + cache)


def measure(shape: Shape, cells: list[Cell], arguments: argparse.Namespace) -> tuple[dict, dict]:
    """Starts both sides, checks that their ids agree, and measures them in turns.

    Returns:
      The facts of both sides.

    Raises:
      Unequal: the ids differ.
      Noisy: other programs use the machine.
    """
    dtype = "bfloat16" if arguments.device == "gpu" else "float32"
    text = json.dumps(dataclasses.asdict(shape))
    workers = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            ours = Worker(
                [
                    sys.executable, "-m", "benchmarks.decode_ours", text, f"--dtype={dtype}",
                    f"--prompt={arguments.prompt}", f"--out={folder}",
                ],
                {"JAX_PLATFORMS": "cuda" if arguments.device == "gpu" else "cpu"},
            )  # fmt: skip
            workers.append(ours)
            facts = ours.ask("facts")  # the worker answers after it has written its files
            theirs = Worker(
                [
                    arguments.peer_python, "-m", "benchmarks.decode_torch", text,
                    f"--dtype={dtype}", f"--device={arguments.device}", f"--folder={folder}",
                    f"--images={json.dumps(facts['images'])}",
                ],
                {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
            )  # fmt: skip
            workers.append(theirs)
            for cell in cells:
                request = cell.batch, cell.new, GUIDANCE if cell.guided else 1.0
                first = ours.ask("run", *request)[1]  # compiles
                second = theirs.ask("run", cell.batch, AGREE, request[2])[1]
                same = [a[:AGREE] == b for a, b in zip(first, second, strict=True)]
                log(f"{request}: {sum(same)} of {len(same)} rows start with equal ids")
                if dtype == "float32" and not all(same):
                    raise Unequal(f"different ids for {request}: not the same computation")
                for (fast, slow), others in rounds(
                    workers,
                    lambda worker, cell=cell, request=request: (
                        cell.batch * cell.new / worker.ask("run", *request)[0]
                    ),
                    arguments.rounds,
                    arguments.noise,
                    arguments.patience,
                    "{:,.1f} tokens/s".format,
                ):
                    cell.ours.append(fast)
                    cell.theirs.append(slow)
                    cell.others = max(cell.others, others)
            return facts, theirs.ask("facts")
        finally:
            for worker in workers:
                worker.end()


def page(results: dict[str, tuple[Shape, list[Cell], dict]], theirs: dict, arguments) -> str:
    """Returns the page with a table row for each cell."""
    ours = next(iter(results.values()))[2]
    width = 2 if arguments.device == "gpu" else 4
    cells = [cell for _, cells, _ in results.values() for cell in cells]
    lines = [
        "# Decoding speed",
        "",
        "```bash",
        "python -m benchmarks.decode --shape=10m --shape=125m --out=docs/decode_speed.md",
        "```",
        "",
        f"The benchmark times greedy decoding after prompts of {arguments.prompt} tokens. It "
        f"compares {ours['name']} with {theirs['name']}. Both sides have the same weights, in "
        f"{'bfloat16' if width == 2 else 'float32'}, on {ours['device']} x {ours['devices']}; "
        f"PyTorch has {theirs['threads']} threads. Guidance has weight {GUIDANCE:g} and a prompt "
        f"of the same length. The numbers are medians of {arguments.rounds} rounds. Other "
        f"programs used at most {100 * max(cell.others for cell in cells):.1f} % of the CPU.",
        "",
        "*Ours beside plain* is the time of a guided run divided by that of a run without "
        "guidance. *Bandwidth* is the bytes that our steps must read (the weights once, and the "
        f"cache of each row), as a share of the {ours['bandwidth'] / 1e9:.1f} GB/s at which JAX "
        "reads 1 GiB on this machine (the faster of a sum and a product). Data in the processor's "
        "caches is read faster.",
        "",
        "| model | batch | new tokens | guidance | ours, tokens/s | theirs | ratio | its spread "
        "| ours beside plain | bandwidth |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, (shape, cells, facts) in results.items():
        for cell in cells:
            ratios = sorted(a / b for a, b in zip(cell.ours, cell.theirs, strict=True))
            speed, other = statistics.median(cell.ours), statistics.median(cell.theirs)
            plain = next(
                c for c in cells if (c.batch, c.new, c.guided) == (cell.batch, cell.new, False)
            )
            cost = statistics.median(plain.ours) / speed
            read = cell.read_bytes(shape, arguments.prompt, width) * speed / cell.batch
            row = [
                f"{name}: {facts['parameters'] / 1e6:.1f} M", f"{cell.batch}", f"{cell.new:,}",
                "yes" if cell.guided else "no", f"{speed:,.1f}", f"{other:,.1f}",
                f"**{statistics.median(ratios):.2f}**", f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
                f"{cost:.2f} x the time" if cell.guided else "-",
                f"{100 * read / facts['bandwidth']:.0f} %",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join([*lines, ""])


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", action="append", choices=SHAPES, help="may be repeated")
    parser.add_argument("--batch", type=int, action="append", help="prompts in a batch; 1 and 8")
    parser.add_argument(
        "--new", type=int, action="append", help="new ids per prompt; 256 and 1,024"
    )
    parser.add_argument("--prompt", type=int, default=64, help="tokens in a prompt")
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds")
    parser.add_argument(
        "--noise", type=float, default=0.03, help="share of the CPU that other programs may use"
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=600,
        help="seconds to wait for a quiet machine before a round",
    )
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument(
        "--peer_python",
        default=str(ROOT / ".venv-peers" / "bin" / "python"),
        help="Python with PyTorch",
    )
    parser.add_argument("--out", type=pathlib.Path, help="the page to write")
    arguments = parser.parse_args()
    results, theirs = {}, {}
    for name in arguments.shape or ["10m", "125m"]:
        shape = SHAPES[name]
        settings = itertools.product(
            arguments.batch or [1, 8], arguments.new or [256, 1024], [False, True]
        )
        cells = [Cell(*setting) for setting in settings]
        log(f"{name}: {shape}")
        try:
            facts, theirs = measure(shape, cells, arguments)
        except (Unequal, Noisy) as error:
            sys.exit(f"{name}: {error}")
        results[name] = shape, cells, facts
    text = page(results, theirs, arguments)
    print(text, end="")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
