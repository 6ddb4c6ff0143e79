"""Writes a run's metrics to metrics.jsonl, TensorBoard, a tracker and the terminal."""

import contextlib
import json
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping

import jax
import numpy as np
import PIL.Image
import tensorboardX
from jaxtyping import Float64

from leon_jax import storage
from leon_jax.train import peak_flops
from leon_jax.train.tracker import Tracker

# Metrics that are counts. They are summed over steps and reported as rates.
COUNTS = ("tokens", "pictures", "pairs")
# 1 for an update that was skipped because its loss or gradient was not finite, else 0.
SKIPPED = "skipped"


class Metrics:
    """Collects the metrics of steps and writes their means.

    Args:
      directory: the folder of `metrics.jsonl`, TensorBoard's files and `samples/`; None (on all
        processes but the first) writes and prints nothing.
      step: the step the run starts from. Lines of later steps, which a killed run wrote after its
        last checkpoint, are removed.
      total: the last step of the run, used to estimate the remaining time.
      flops_per_token: operations of one update per token, used for the MFU; 0 if unknown.
      tracker: an experiment tracker that receives the same numbers and images.
    """

    def __init__(
        self,
        directory: pathlib.Path | None,
        step: int,
        total: int,
        flops_per_token: float = 0.0,
        tracker: Tracker | None = None,
    ) -> None:
        self._directory, self._tracker = directory, tracker
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            drop_after(directory / "metrics.jsonl", step)
            self._board = tensorboardX.SummaryWriter(str(directory / "tensorboard"))
        self._total, self._flops_per_token = total, flops_per_token
        self._peak = peak_flops.peak_flops(jax.devices())
        self._start_step, self._step = step, step
        self._pending: list[Mapping[str, jax.Array]] = []
        self._time = self._start_time = time.monotonic()

    def add(self, metrics: Mapping[str, jax.Array]) -> None:
        """Stores one step's metrics on the device, without waiting for them."""
        self._pending.append(metrics)
        self._step += 1

    def fetch(self) -> dict[str, Float64[np.ndarray, "steps"]]:
        """Returns the metrics of all steps since the last fetch; waits for the devices."""
        fetched = jax.device_get(self._pending)
        self._pending = []
        return {
            name: np.array([metrics[name] for metrics in fetched], np.float64)
            for name in fetched[0]
        }

    def report(
        self,
        fetched: Mapping[str, Float64[np.ndarray, "steps"]],
        goodput: float,
        measured: Mapping[str, float] | None = None,
    ) -> dict[str, float]:
        """Writes and returns the means and rates of the fetched metrics, and other metrics.

        Means exclude skipped steps, unless all steps were skipped.

        Args:
          fetched: the result of `fetch`.
          goodput: share of the wall time, 0 to 1.
          measured: more metrics, by name: times of the hosts, and those of an evaluation after the
            last of these steps.
        """
        now = time.monotonic()
        seconds, self._time = now - self._time, now
        updated = fetched[SKIPPED] == 0
        values: dict[str, float] = {}
        for name, column in fetched.items():
            if name in COUNTS:
                values[f"{name}_per_second"] = float(column.sum() / seconds)
            elif name == SKIPPED:
                values[name] = float(column.sum())
            else:
                values[name] = float((column[updated] if updated.any() else column).mean())
        values["seconds_per_step"] = seconds / len(updated)
        values["goodput"] = goodput
        if self._peak and self._flops_per_token and "tokens_per_second" in values:
            values["mfu"] = values["tokens_per_second"] * self._flops_per_token / self._peak
        values |= measured or {}
        if self._directory is not None:
            with (self._directory / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": self._step, **values}) + "\n")
            for name, value in values.items():
                self._board.add_scalar(name, value, self._step)
            if self._tracker is not None:
                self._tracker.log(values, self._step)
            print(self._line(values), file=sys.stderr, flush=True)
        return values

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time within the context from the rates."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._time += time.monotonic() - start

    def save_images(self, images: Mapping[str, np.ndarray]) -> None:
        """Writes sample images, uint8[h, w, 3] by name, as PNG and to TensorBoard."""
        if self._directory is None:
            return
        folder = self._directory / "samples"
        for name, pixels in images.items():
            folder.mkdir(exist_ok=True)
            PIL.Image.fromarray(pixels).save(folder / f"{name}_{self._step:07d}.png")
            self._board.add_image(name, pixels, self._step, dataformats="HWC")
        if self._tracker is not None and images:
            self._tracker.log_images(images, self._step)

    def close(self) -> None:
        """Flushes TensorBoard's buffers and those of the tracker."""
        if self._directory is not None:
            self._board.close()
        if self._tracker is not None:
            self._tracker.close()

    def _line(self, values: Mapping[str, float]) -> str:
        elapsed = time.monotonic() - self._start_time
        seconds_per_step = elapsed / (self._step - self._start_step)
        seconds_left = seconds_per_step * (self._total - self._step)
        parts = [f"step {self._step}/{self._total}"]
        for name, value in values.items():
            if name.startswith(("loss", "heldout/")) or name in (
                "psnr_db",
                "codes_used",
                "accuracy",
            ):
                parts.append(f"{name} {value:.4g}")
            elif name.endswith("_per_second"):
                parts.append(f"{value:,.0f} {name.removesuffix('_per_second')}/s")
            elif name == "mfu" or (name == SKIPPED and value):
                parts.append(f"{name} {value:.3g}")
        minutes, seconds = divmod(round(seconds_left), 60)
        return "  ".join([*parts, f"ETA {minutes}:{seconds:02d}"])


def drop_after(path: pathlib.Path, step: int) -> None:
    """Removes the lines of later steps, and damaged lines, from a file of JSON lines."""
    if not path.exists():
        return
    lines = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                lines.append(line + "\n")
        except (ValueError, KeyError):
            continue  # the partial line of a killed run
    storage.write(path, "".join(lines))
