"""Where a run's numbers go: a JSON line a report, TensorBoard, and one line on the terminal."""

import json
import pathlib
import sys
import time
from collections.abc import Mapping

import jax
import numpy as np
import PIL.Image
import tensorboardX

# Metrics that count things; they are summed over steps and shown as a rate.
COUNTS = ("tokens", "pictures", "pairs")


class Metrics:
    """Collects the metrics of steps and reports their means every so often.

    Args:
      directory: holds `metrics.jsonl`, TensorBoard's files and `samples/`.
      step: where the run starts; lines of later steps, left by a run that was killed after its
        last checkpoint, are dropped.
      total: where it ends, for the time left.
    """

    def __init__(self, directory: pathlib.Path, step: int, total: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / "metrics.jsonl"
        self._samples = directory / "samples"
        _drop_after(self._path, step)
        self._board = tensorboardX.SummaryWriter(str(directory / "tensorboard"))
        self._total = total
        self._start_step, self._step = step, step
        self._pending: list[Mapping[str, jax.Array]] = []
        self._time = self._start_time = time.monotonic()

    def add(self, metrics: Mapping[str, jax.Array]) -> None:
        """Keeps one step's metrics on the device, without waiting for them."""
        self._pending.append(metrics)
        self._step += 1

    def report(self) -> dict[str, float]:
        """Writes and returns the means (and rates) since the last report."""
        fetched = jax.device_get(self._pending)
        now = time.monotonic()
        seconds = now - self._time
        values: dict[str, float] = {}
        for name in fetched[0]:
            column = np.array([metrics[name] for metrics in fetched], np.float64)
            if name in COUNTS:
                values[f"{name}_per_second"] = float(column.sum() / seconds)
            else:
                values[name] = float(column.mean())
        values["seconds_per_step"] = seconds / len(fetched)
        self._pending, self._time = [], now
        with self._path.open("a") as file:
            file.write(json.dumps({"step": self._step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, self._step)
        print(self._line(values), file=sys.stderr, flush=True)
        return values

    def pause(self) -> None:
        """Leaves time spent on anything but steps out of the rates; call it after a report."""
        self._time = time.monotonic()

    def pictures(self, pictures: Mapping[str, np.ndarray]) -> None:
        """Writes sample pictures, uint8[h, w, 3], as PNG and to TensorBoard."""
        for name, pixels in pictures.items():
            self._samples.mkdir(exist_ok=True)
            PIL.Image.fromarray(pixels).save(self._samples / f"{name}_{self._step:07d}.png")
            self._board.add_image(name, pixels, self._step, dataformats="HWC")

    def close(self) -> None:
        """Flushes what is buffered."""
        self._board.close()

    def _line(self, values: Mapping[str, float]) -> str:
        elapsed = time.monotonic() - self._start_time
        done = self._step - self._start_step
        left = elapsed / done * (self._total - self._step)
        shown = [f"step {self._step}/{self._total}"]
        for name, value in values.items():
            if name.startswith("loss") or name in ("psnr_db", "codes_used", "accuracy"):
                shown.append(f"{name} {value:.4g}")
            elif name.endswith("_per_second"):
                shown.append(f"{value:,.0f} {name.removesuffix('_per_second')}/s")
        minutes, seconds = divmod(round(left), 60)
        return "  ".join([*shown, f"ETA {minutes}:{seconds:02d}"])


def _drop_after(path: pathlib.Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue  # the half line of a killed run
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(kept))
    temporary.replace(path)
