#!/usr/bin/env python3
"""Benchmarks a training step: our decoder against OPT of transformers in PyTorch.

    python -m benchmarks.train_step --shape=10m --shape=125m --out=out/train_step.md

Both train the same model with the same weights, AdamW and clipping. First their losses on the same
batch are compared. On a CPU, ours computes in float32, and with products of bfloat16 operands.
PyTorch runs eagerly and under `torch.compile`, in float32 and under autocast to bfloat16. On a GPU
(`--device=gpu`) all compute in bfloat16 with float32 weights.

All of these take turns on one machine, a few steps each. Rounds in which other programs used the
CPU do not count (see `benchmarks/quiet.py`).
"""

import argparse
import dataclasses
import json
import os
import pathlib
import platform
import statistics
import sys
import tempfile

from benchmarks.quiet import Noisy, rounds
from benchmarks.shapes import SHAPES, Shape
from benchmarks.turns import ROOT, Worker

OURS = {
    "cpu": {"float32": {}, "bfloat16 products": {"products": "bfloat16"}},
    "gpu": {"bfloat16": {"dtype": "bfloat16"}},
}
THEIRS = {
    "cpu": ("eager", "compiled", "eager autocast", "compiled autocast"),
    "gpu": ("eager autocast", "compiled autocast"),
}


class Unequal(Exception):
    """The sides cannot be compared."""


@dataclasses.dataclass(frozen=True)
class Side:
    """A kind of step of one of the two workers.

    Attributes:
      worker: the worker.
      name: name of the step.
      is_ours: whether the worker is ours.
    """

    worker: Worker
    name: str
    is_ours: bool

    @property
    def pid(self) -> int:
        return self.worker.pid

    @property
    def tolerance(self) -> float:
        """The largest difference of the loss on the first batch, in nats."""
        return 2e-2 if "bfloat16" in self.name or "autocast" in self.name else 1e-4

    def __str__(self) -> str:
        return f"{'leon_jax' if self.is_ours else 'PyTorch'}, {self.name}"


@dataclasses.dataclass
class Result:
    """The measurements of one shape.

    Attributes:
      speeds: tokens per second in each round, by side.
      others: the largest share of the CPU that other programs used in a round.
      facts: the facts of both workers.
    """

    speeds: dict[Side, list[float]]
    others: float
    facts: tuple[dict, dict]

    def rows(self, name: str, shape: Shape) -> list[str]:
        """Returns a table row for each side."""
        medians = {side: statistics.median(speeds) for side, speeds in self.speeds.items()}
        best = max((side for side in medians if not side.is_ours), key=medians.__getitem__)
        title = (
            f"{name}: {self.facts[0]['parameters'] / 1e6:.1f} M, {shape.layers} x {shape.embed}, "
            f"{shape.heads} heads, vocabulary {shape.vocab:,}, batch {shape.batch} x "
            f"{shape.length:,}"
        )
        rows = []
        for side, speeds in self.speeds.items():
            ratios = sorted(a / b for a, b in zip(speeds, self.speeds[best], strict=True))
            mfu = "-"
            if side.is_ours and (peak := self.facts[0]["peak"]):
                mfu = f"{100 * medians[side] * self.facts[0]['flops_per_token'] / peak:.1f} %"
            cells = [
                title, str(side), f"{medians[side]:,.0f}", f"**{statistics.median(ratios):.2f}**",
                f"{ratios[0]:.2f} to {ratios[-1]:.2f}", mfu,
            ]  # fmt: skip
            rows.append(f"| {' | '.join(cells)} |")
            title = ""
        return rows


def measure(shape: Shape, arguments: argparse.Namespace) -> Result:
    """Starts both workers, checks that all losses agree, and measures all sides in turns.

    Raises:
      Unequal: the first losses differ.
      Noisy: other programs use the machine.
    """
    device = arguments.device
    text, extra = json.dumps(dataclasses.asdict(shape)), json.loads(arguments.model)
    models = {name: model | extra for name, model in OURS[device].items()}
    workers = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            ours = Worker(
                [
                    sys.executable, "-m", "benchmarks.train_step_ours", text, f"--out={folder}",
                    f"--models={json.dumps(models)}", f"--training={arguments.training}",
                ],
                {"JAX_PLATFORMS": "cuda" if device == "gpu" else "cpu"},
            )  # fmt: skip
            workers.append(ours)
            ours.ask("facts")  # the worker answers after it has written its files
            theirs = Worker(
                [
                    arguments.peer_python, "-m", "benchmarks.train_step_torch", text,
                    f"--device={device}", f"--folder={folder}",
                    *(["--biases"] if arguments.biases else []),
                ],
                {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
            )  # fmt: skip
            workers.append(theirs)
            sides = [Side(ours, name, True) for name in models]
            sides += [Side(theirs, name, False) for name in THEIRS[device]]
            _check_losses(sides)
            for side in sides:
                side.worker.ask("steps", side.name, 1)  # compiles, allocates and warms up
            tokens = arguments.steps * shape.batch * shape.length
            results = list(
                rounds(
                    sides,
                    lambda side: side.worker.ask("steps", side.name, arguments.steps),
                    arguments.rounds,
                    arguments.noise,
                    arguments.patience,
                    lambda seconds: f"{tokens / seconds:,.0f} tokens/s",
                )
            )
            speeds = {
                side: [tokens / seconds[number] for seconds, _ in results]
                for number, side in enumerate(sides)
            }
            others = max(others for _, others in results)
            return Result(speeds, others, (ours.ask("facts"), theirs.ask("facts")))
        finally:
            for worker in workers:
                worker.end()


def _check_losses(sides: list[Side]) -> None:
    """Checks that the losses on the first batch are those of the first side.

    Raises:
      Unequal: they are not.
    """
    losses = {side: side.worker.ask("loss", side.name) for side in sides}
    first = losses[sides[0]]
    for side, loss in losses.items():
        log(f"{side}: first loss {loss:.6f}")
        if abs(loss - first) > max(side.tolerance, sides[0].tolerance):
            raise Unequal(f"the losses differ, {first} and {loss}: not the same model")


def processor() -> str:
    """Returns the name of the processor and its instructions for bfloat16 (Linux)."""
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    values = {name.strip(): value.strip() for name, _, value in (s.partition(":") for s in lines)}
    flags = [flag for flag in values.get("flags", "").split() if flag.endswith("_bf16")]
    name = values.get("model name") or platform.processor() or platform.machine()
    return f"{name} ({', '.join(flags) or 'no bfloat16 instructions'}), {os.cpu_count()} cores"


def table(results: dict[str, tuple[Shape, Result]], arguments: argparse.Namespace) -> str:
    """Returns the page with the table rows of each shape."""
    ours, theirs = next(iter(results.values()))[1].facts
    biases = (
        "OPT has biases and affine norms here, which our model lacks; they are a few per mille of "
        "the operations."
        if arguments.biases
        else "OPT has no biases and affine norms here, so both models are the same."
    )
    max_others = max(result.others for _, result in results.values())
    devices = processor() if ours["device"] == "cpu" else f"{ours['device']} x {ours['devices']}"
    head = [
        f"The benchmark times training steps on {devices}. It compares {ours['name']} with "
        f"{theirs['name']}; PyTorch has {theirs['threads']} threads. {biases} A step has the "
        "forward pass, the cross-entropy of all tokens, the backward pass, clipping and AdamW. The "
        f"numbers are medians of {arguments.rounds} rounds of {arguments.steps} steps per side. "
        "The ratio is to the fastest PyTorch side. Other programs used at most "
        f"{100 * max_others:.1f} % of the CPU.",
        "",
        "| model | side | tokens/s | ratio | its spread | our MFU |",
        "|---|---|---|---|---|---|",
    ]
    rows = [row for name, (shape, result) in results.items() for row in result.rows(name, shape)]
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
