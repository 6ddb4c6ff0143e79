"""The PyTorch side of `benchmarks/decode.py`: `generate` of transformers.

It runs in the environment of the peers. Guidance uses its options `guidance_scale` and
`negative_prompt_ids`.
"""

import argparse
import json
import pathlib
import time

import torch
import transformers
from safetensors.numpy import load_file

from benchmarks.shapes import Shape
from benchmarks.turns import serve
from tests.models.opt_in_torch import build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", help="JSON of a benchmarks.shapes.Shape")
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="weights, prompts")
    parser.add_argument("--images", type=json.loads, required=True, help="JSON of [first, stop]")
    side = Theirs(parser.parse_args())
    serve({"run": side.run, "facts": side.facts})


class Theirs:
    """OPT and its prompts."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        shape = Shape(**json.loads(arguments.shape))
        self._device = "cuda" if arguments.device == "gpu" else "cpu"
        weights = load_file(arguments.folder / "weights.safetensors")
        dtype = torch.bfloat16 if arguments.dtype == "bfloat16" else torch.float32
        self._model = build(weights, shape.heads, "sdpa").to(self._device, dtype).eval()
        prompts = load_file(arguments.folder / "prompts.safetensors")
        self._ids = torch.from_numpy(prompts["ids"]).to(self._device)
        self._unconditional = torch.from_numpy(prompts["unconditional"]).to(self._device)
        first, stop = arguments.images
        # Suppress all ids but image codes, as the grammar does on our side.
        self._others = [*range(first), *range(stop, shape.vocab)]

    def run(self, batch: int, new: int, guidance: float) -> list:
        """Generates `new` greedy ids for each of `batch` prompts; returns seconds and ids."""
        ids = self._ids[:batch]
        options = {}
        if guidance != 1:
            options = {
                "guidance_scale": guidance,
                "negative_prompt_ids": self._unconditional.expand(batch, -1),
            }
        start = time.monotonic()
        with torch.inference_mode():
            outputs = self._model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new,
                min_new_tokens=new, suppress_tokens=self._others, pad_token_id=1, **options,
            )  # fmt: skip
        if self._device == "cuda":
            torch.cuda.synchronize()
        return [time.monotonic() - start, outputs[:, ids.shape[1] :].tolist()]

    def facts(self) -> dict:
        return {
            "name": f"transformers {transformers.__version__} `generate` of OPT "
            f"(PyTorch {torch.__version__}, SDPA)",
            "threads": torch.get_num_threads(),
        }


if __name__ == "__main__":
    main()
