"""Compares the losses of two trainings that differ in `head_exchange`, and prints a table.

    python -m benchmarks.head_exchange --workdir=out/head_exchange

Trains a small decoder on the emoji with 8 simulated devices, 4 of which share the weights: with the
gradient of the output head exchanged in float32 and in bfloat16. A third training, in float32 with
another seed, shows how far two runs may be apart. Run it again to resume an interrupted run. It
needs the folder that `leon prepare` writes.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
# Name: dtype of the exchange, seed.
RUNS = {
    "float32": ("float32", 0),
    "bfloat16": ("bfloat16", 0),
    "float32, another seed": ("float32", 1),
}
HELD_OUT = "heldout/image_loss_2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("out/head_exchange"))
    parser.add_argument("--data", default="data/emoji_prepared", help="the prepared folder")
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    losses, held_out = {}, {}
    for name, (exchange, seed) in RUNS.items():
        run = arguments.workdir / name.replace(", ", "_").replace(" ", "_")
        train(run, arguments.data, arguments.steps, exchange, seed)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses[name] = np.array([line["loss"] for line in lines])
        held_out[name] = lines[-1][HELD_OUT]
    print(table(losses, held_out))


def train(run: pathlib.Path, data: str, steps: int, exchange: str, seed: int) -> None:
    """Trains a decoder, and logs the loss of each step."""
    flags = {
        "steps": steps,
        "seed": seed,
        "head_exchange": exchange,
        "batch_size": 8,
        "model.layers": 2,
        "model.embed": 64,
        "model.mlp": 256,
        "optimizer.warmup_steps": 20,
        "data.folder": data,
        "data.variants": 1,
        "data.length": 256,
        "data.text": ROOT / "leon_jax/weights/emoji/text.json",
        "samples.image": "",
        "loop.mesh": "(2, 4, 1, 1)",
        "loop.log_every": 1,
        "loop.eval_every": steps,
    }
    command = [
        sys.executable, "-m", "leon_jax.cli.main", "train",
        "--config=configs/emoji/decoder_paper.py", f"--workdir={run}",
        *(f"--config.{key}={value}" for key, value in flags.items()),
    ]  # fmt: skip
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8",
    }
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)


def table(losses: dict[str, np.ndarray], held_out: dict[str, float], width: int = 25) -> str:
    """Returns a Markdown table: mean losses of `width` steps, and the differences of the runs."""
    names = list(losses)
    rows = [f"| steps | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for start in range(0, len(losses[names[0]]), width):
        part = [losses[name][start : start + width] for name in names]
        steps = f"{start + 1} to {start + len(part[0])}"
        rows.append(f"| {steps} | {' | '.join(f'{values.mean():.4f}' for values in part)} |")
    rows.append(f"| held out | {' | '.join(f'{held_out[name]:.4f}' for name in names)} |")
    first = losses[names[0]]
    for name in names[1:]:
        gaps = np.abs(losses[name] - first)
        rows.append(
            f"\n{name}: the loss of a step differs from that of {names[0]} by {gaps.mean():.5f} "
            f"on average and {gaps.max():.5f} at most"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    main()
