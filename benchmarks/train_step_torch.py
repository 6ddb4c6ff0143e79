"""The PyTorch side of `benchmarks/train_step.py`: OPT of transformers.

It runs in the environment of the peers. A step is a plain PyTorch loop: forward pass, cross-entropy
of all tokens, backward pass, clipping, `torch.optim.AdamW`. PyTorch's fast paths are on: SDPA, and
the faster of `foreach` and `fused`.
"""

import argparse
import json
import pathlib
import time

import torch
import transformers
from safetensors.numpy import load_file

from benchmarks.shapes import OPTIMIZER, Shape
from benchmarks.turns import serve
from tests.models.opt_in_torch import build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", help="JSON of a benchmarks.shapes.Shape")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="weights, batches")
    parser.add_argument("--biases", action="store_true")
    side = Theirs(parser.parse_args())
    serve({"loss": side.loss, "steps": side.steps, "facts": side.facts})


class Theirs:
    """OPT, its optimizer and its batches.

    The names of its steps have the words `eager` or `compiled`, and `autocast`: to bfloat16.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        shape = Shape(**json.loads(arguments.shape))
        self._device = "cuda" if arguments.device == "gpu" else "cpu"
        weights = load_file(arguments.folder / "weights.safetensors")
        model = build(weights, shape.heads, "sdpa", arguments.biases).to(self._device).train()
        ids = load_file(arguments.folder / "ids.safetensors")["ids"]
        self._batches = torch.from_numpy(ids).to(self._device)
        self._models = {"eager": model, "compiled": torch.compile(model)}
        self._parameters = list(model.parameters())
        self._optimizer, self._kind = self._fastest()
        self._step_count = 0

    def steps(self, name: str, count: int) -> float:
        """Runs `count` steps; returns the seconds."""
        start = time.monotonic()
        for _ in range(count):
            self._optimizer.zero_grad(set_to_none=True)
            loss = self._forward(name, self._batches[self._step_count % len(self._batches)])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self._parameters, OPTIMIZER["clip_norm"])
            self._optimizer.step()
            self._step_count += 1
        if self._device == "cuda":
            torch.cuda.synchronize()
        return time.monotonic() - start

    def loss(self, name: str) -> float:
        """Returns the loss of the first batch, without an update."""
        with torch.no_grad():
            return float(self._forward(name, self._batches[0]))

    def facts(self) -> dict:
        return {
            "name": f"transformers {transformers.__version__} OPT (PyTorch {torch.__version__}, "
            f"SDPA, {self._kind} AdamW)",
            "threads": torch.get_num_threads(),
        }

    def _forward(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        words = name.split()
        with torch.autocast(self._device, torch.bfloat16, enabled="autocast" in words):
            logits = self._models[words[0]](input_ids=ids[:, :-1], use_cache=False).logits
        targets = ids[:, 1:].flatten()
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets)

    def _fastest(self) -> tuple[torch.optim.AdamW, str]:
        """Returns the faster of PyTorch's two fast AdamW implementations, and its name."""
        seconds = {}
        for parameter in self._parameters:
            parameter.grad = torch.zeros_like(parameter)
        for kind in ("fused", "foreach"):
            optimizer = self._adamw(kind, 0.0)  # changes nothing
            optimizer.step()
            start = time.monotonic()
            for _ in range(3):
                optimizer.step()
            if self._device == "cuda":
                torch.cuda.synchronize()
            seconds[kind] = time.monotonic() - start
        kind = min(seconds, key=seconds.get)
        return self._adamw(kind, OPTIMIZER["learning_rate"]), kind

    def _adamw(self, kind: str, learning_rate: float) -> torch.optim.AdamW:
        groups = [
            {"params": [p for p in self._parameters if p.ndim >= 2]},
            {"params": [p for p in self._parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=learning_rate,
            betas=(OPTIMIZER["beta1"], OPTIMIZER["beta2"]),
            eps=OPTIMIZER["eps"],
            weight_decay=OPTIMIZER["weight_decay"],
            **{kind: True},
        )


if __name__ == "__main__":
    main()
