#!/usr/bin/env python3
"""Benchmarks a training step: our decoder against OPT of transformers in PyTorch.

    python -m benchmarks.train_step --shape=10m --shape=125m --out=out/train_step.md

Both sides train the same model with the same weights, AdamW and clipping. First their losses on the
same batch are compared. They are two processes that take turns on one machine, a few steps each.
Rounds in which other programs used the CPU do not count (see `benchmarks/quiet.py`).

On a GPU (`--device=gpu`) both compute in bfloat16 with float32 weights, PyTorch under autocast.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import sys
import tempfile

from benchmarks.quiet import Noisy, rounds
from benchmarks.shapes import SHAPES, Shape
from benchmarks.turns import ROOT, Worker

TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # of the loss on the first batch, in nats


class Unequal(Exception):
    """The two sides cannot be compared."""


@dataclasses.dataclass
class Result:
    """The measurements of one shape.

    Attributes:
      ours, theirs: tokens per second in each round.
      others: the largest share of the CPU that other programs used in a round.
      facts: the facts of both sides.
    """

    ours: list[float]
    theirs: list[float]
    others: float
    facts: tuple[dict, dict]

    def row(self, name: str, shape: Shape) -> str:
        """Returns a table row."""
        ratios = sorted(a / b for a, b in zip(self.ours, self.theirs, strict=True))
        ours, theirs = statistics.median(self.ours), statistics.median(self.theirs)
        mfu = ""
        if peak := self.facts[0]["peak"]:
            mfu = f"{100 * ours * self.facts[0]['flops_per_token'] / peak:.1f} %"
        cells = [
            f"{name}: {self.facts[0]['parameters'] / 1e6:.1f} M, "
            f"{shape.layers} x {shape.embed}, {shape.heads} heads, "
            f"vocabulary {shape.vocab:,}, batch {shape.batch} x {shape.length:,}",
            f"{ours:,.0f}", f"{theirs:,.0f}", f"**{statistics.median(ratios):.2f}**",
            f"{ratios[0]:.2f} to {ratios[-1]:.2f}", mfu or "-",
        ]  # fmt: skip
        return f"| {' | '.join(cells)} |"


def measure(shape: Shape, arguments: argparse.Namespace) -> Result:
    """Starts both sides, checks that their losses agree, and measures them in turns.

    Raises:
      Unequal: the first losses differ.
      Noisy: other programs use the machine.
    """
    dtype = "bfloat16" if arguments.device == "gpu" else "float32"
    text = json.dumps(dataclasses.asdict(shape))
    options = [flag for flag in ("compile", "biases") if getattr(arguments, flag)]
    workers = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            ours = Worker(
                [
                    sys.executable, "-m", "benchmarks.train_step_ours", text, f"--dtype={dtype}",
                    f"--out={folder}", f"--model={arguments.model}",
                    f"--training={arguments.training}",
                ],
                {"JAX_PLATFORMS": "cuda" if arguments.device == "gpu" else "cpu"},
            )  # fmt: skip
            workers.append(ours)
            first = ours.ask("loss")  # the worker answers after it has written its files
            theirs = Worker(
                [
                    arguments.peer_python, "-m", "benchmarks.train_step_torch", text,
                    f"--dtype={dtype}", f"--device={arguments.device}", f"--folder={folder}",
                    *(f"--{flag}" for flag in options),
                ],
                {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
            )  # fmt: skip
            workers.append(theirs)
            second = theirs.ask("loss")
            if abs(first - second) > TOLERANCE[dtype]:
                raise Unequal(f"the losses differ, {first} and {second}: not the same model")
            log(f"first loss {first:.6f} and {second:.6f}")
            for worker in workers:
                worker.ask("steps", 1)  # compiles, allocates and warms up
            tokens = arguments.steps * shape.batch * shape.length
            results = list(
                rounds(
                    workers,
                    lambda worker: worker.ask("steps", arguments.steps),
                    arguments.rounds,
                    arguments.noise,
                    arguments.patience,
                    lambda answer: f"{tokens / answer[0]:,.0f} tokens/s",
                )
            )
            losses = [loss for _, loss in results[-1][0]]
            speeds = [[tokens / answers[side][0] for answers, _ in results] for side in (0, 1)]
            max_others = max(others for _, others in results)
            log(f"last loss {losses[0]:.6f} and {losses[1]:.6f}")
            return Result(*speeds, max_others, (ours.ask("facts"), theirs.ask("facts")))
        finally:
            for worker in workers:
                worker.end()


def table(results: dict[str, tuple[Shape, Result]], arguments: argparse.Namespace) -> str:
    """Returns the page with a table row for each shape."""
    ours, theirs = next(iter(results.values()))[1].facts
    biases = (
        "OPT has biases and affine norms here, which our model lacks; they are a few per mille of "
        "the operations."
        if arguments.biases
        else "OPT has no biases and affine norms here, so both models are the same."
    )
    max_others = max(result.others for _, result in results.values())
    head = [
        f"The benchmark times training steps on {ours['device']} x {ours['devices']}. It compares "
        f"{ours['name']} with {theirs['name']}; PyTorch has {theirs['threads']} threads. {biases} "
        "A step has the forward pass, the cross-entropy of all tokens, the backward pass, clipping "
        f"and AdamW. The numbers are medians of {arguments.rounds} rounds of {arguments.steps} "
        f"steps per side. Other programs used at most {100 * max_others:.1f} % of the CPU.",
        "",
        "| model | ours, tokens/s | PyTorch, tokens/s | ratio | its spread | our MFU |",
        "|---|---|---|---|---|---|",
    ]
    rows = [result.row(name, shape) for name, (shape, result) in results.items()]
    return "\n".join([*head, *rows, ""])


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", action="append", choices=SHAPES, help="may be repeated")
    parser.add_argument("--steps", type=int, default=3, help="of a turn")
    parser.add_argument("--rounds", type=int, default=7, help="number of rounds")
    parser.add_argument(
        "--noise", type=float, default=0.03, help="share of the CPU that other programs may use"
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=600,
        help="seconds to wait for a quiet machine before a round",
    )
    parser.add_argument("--batch", type=int, help="rows of a batch; the default is the shape's")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--compile", action="store_true", help="PyTorch under torch.compile")
    parser.add_argument("--biases", action="store_true", help="OPT with biases and affine norms")
    parser.add_argument("--model", default="{}", help='fields of our model, as {"remat": "dots"}')
    parser.add_argument(
        "--training", default="{}", help='fields of our training, as {"loss_chunk": 1024}'
    )
    parser.add_argument(
        "--peer_python",
        default=str(ROOT / ".venv-peers" / "bin" / "python"),
        help="Python with PyTorch",
    )
    parser.add_argument("--out", type=pathlib.Path, help="the page to write")
    arguments = parser.parse_args()
    results = {}
    for name in arguments.shape or ["10m", "125m"]:
        shape = SHAPES[name]
        if arguments.batch:
            shape = dataclasses.replace(shape, batch=arguments.batch)
        log(f"{name}: {shape}")
        try:
            results[name] = (shape, measure(shape, arguments))
        except (Unequal, Noisy) as error:
            sys.exit(f"{name}: {error}")
    page = table(results, arguments)
    print(page, end="")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(page)


if __name__ == "__main__":
    main()
