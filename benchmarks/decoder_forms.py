"""Compares forms, sizes, optimizers and augmentations of a small decoder at equal cost.

    python -m benchmarks.decoder_forms --run=runs/emoji

The run is a workdir of `leon pipeline` with an encoding of at least 8 variants. Trains the decoder
of configs/emoji/decoder.py with the changes of each row. The steps are chosen so that each row
takes about the same time on one core. Run it again to resume an interrupted run. --rows names some
of the rows, so that two processes can share the work. Writes docs/decoder_forms.md when every row
is measured.
"""

import dataclasses
import json
import pathlib
import runpy
from collections.abc import Mapping
from typing import Any

from absl import app, flags

from benchmarks.short_runs import held_out, train
from leon_jax import weight_files
from leon_jax.config import build
from leon_jax.models.vqgan import VQGANConfig
from leon_jax.pipeline import stages
from leon_jax.tokenizers.text import TextTokenizer

_RUN = flags.DEFINE_string("run", "runs/emoji", "A workdir of leon pipeline.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/decoder_forms", "The folder of all results.")
_ROWS = flags.DEFINE_list("rows", [], "Rows to measure; by default all.")
_PAGE = flags.DEFINE_string("page", "docs/decoder_forms.md", "The page to write.")

CONFIG = "configs/emoji/decoder.py"
# The form of CM3Leon (arXiv 2309.02591), with what helped the small decoder of 32 px.
CM3LEON = {
    "form": {}, "position_init": "sinusoids", "position_std": 0.02, "part_step": 32,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table: changes of the decoder's configuration.

    Attributes:
      steps: training steps.
      text: what the row is, for the table.
      model, optimizer, data, masking: changed keys of these parts of the configuration.
      form: changed keys of `model.form`.
      codebook: whether the embeddings of image ids start at the vectors of their codes.
      seed: seed of the initialisation, the order and the masks.
    """

    steps: int
    text: str
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    form: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    optimizer: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    masking: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    codebook: bool = True
    seed: int = 0


ADAMW = {"kind": "adamw", "learning_rate": 1e-3}
ROWS = {
    "shipped": Row(500, "the configuration without a change"),
    "shipped-seed-1": Row(500, "the same, another seed", seed=1),
    "cm3leon": Row(500, "the form of CM3Leon, learned positions", CM3LEON),
    "llama-1d": Row(500, "positions count the tokens", {"part_step": 32}, {"positions": "rotary"}),
    "no-qk-norm": Row(500, "without norms of queries and keys", form={"qk_norm": "none"}),
    "untied": Row(500, "with an untied head", form={"tied_head": False}),
    "narrow": Row(900, "6 layers of width 192", {"layers": 6, "embed": 192, "mlp": 512}),
    "shallow": Row(900, "4 layers of width 256", {"layers": 4}),
    "random": Row(500, "all embeddings start at random", codebook=False),
    "adamw": Row(520, "AdamW at half the learning rate", optimizer=ADAMW),
    "adamw-seed-1": Row(520, "the same, another seed", optimizer=ADAMW, seed=1),
    "slower": Row(500, "half the learning rate", optimizer={"learning_rate": 1e-3}),
    "no-average": Row(500, "no average of the weights", optimizer={"average": 0.0}),
    "variants": Row(500, "8 variants of each image", data={"variants": 8}),
    "spans": Row(500, "more masked spans, as in the paper", masking={"rate": 1.0}),
}


def main(argv: list[str]) -> None:
    """Trains the missing rows, then writes the page if every row is there."""
    del argv
    work = pathlib.Path(_WORKDIR.value).absolute()
    for name in _ROWS.value or ROWS:
        measure(ROWS[name], work / name)
    paths = {name: work / name / "result.json" for name in ROWS}
    if all(path.exists() for path in paths.values()):
        results = {name: json.loads(path.read_text()) for name, path in paths.items()}
        pathlib.Path(_PAGE.value).write_text(page(results))


def measure(row: Row, folder: pathlib.Path) -> None:
    """Trains the decoder of a row and writes result.json, unless it is there."""
    if (folder / "result.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    files = stages.Layout(pathlib.Path(_RUN.value).absolute())
    tokenizer = build(VQGANConfig, weight_files.read_config(files.tokenizer, "tokenizer"), "config")
    values = runpy.run_path(CONFIG)["stage"](tokenizer.grid)
    text_tokens = TextTokenizer.load(files.text).size
    text_start = 4 + tokenizer.codes + 2 + values["vocabulary"]["sentinels"]
    values["vocabulary"] |= {
        "image_codes": tokenizer.codes, "text_start": text_start, "text_tokens": text_tokens,
    }  # fmt: skip
    form = row.model["form"] if "form" in row.model else values["model"]["form"] | row.form
    values["model"] |= {"vocab_size": text_start + text_tokens, **row.model, "form": form}
    values["optimizer"] |= {"decay_steps": row.steps // 5, **row.optimizer}
    values["data"] |= {"folder": str(files.documents), "text": str(files.text), **row.data}
    values["masking"] |= row.masking
    values["codebook"] = str(files.tokenizer) if row.codebook else ""
    values["samples"] = {}
    values["seed"] = row.seed
    values["loop"] = {"log_every": 50, "save_every": 200, "eval_every": 100}
    train(folder, "decoder", values, row.steps)
    arrays, _ = weight_files.load(folder / "decoder/export/decoder.safetensors", "decoder")
    parameters = sum(array.size for array in arrays.values())
    seconds = json.loads((folder / "core_seconds.json").read_text())["decoder"]
    result = {**held_out(folder / "decoder"), "parameters": parameters, "core_seconds": seconds}
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")


def page(results: dict[str, dict]) -> str:
    """Returns the text of docs/decoder_forms.md."""
    lines = []
    for name, result in results.items():
        losses = [f"{result[f'image_loss_{docs}']:.3f}" for docs in range(3)]
        cells = [
            name, ROWS[name].text, f"{result['parameters'] / 1e6:.1f}", ROWS[name].steps,
            result["core_seconds"], *losses, f"{result['text_loss_2']:.3f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return PAGE.format(rows="\n".join(lines))


PAGE = """# Forms of a small decoder

```bash
leon pipeline --config=configs/emoji/pipeline.py --workdir=runs/emoji
python -m benchmarks.decoder_forms --run=runs/emoji
```

The benchmark needs the pipeline up to its encodings. Each row trains the decoder of
configs/emoji/decoder.py with one change, for about the same time on one core. The core seconds
are measured.

| row | change | parameters, M | steps | core seconds | image loss, 0 read | 1 | 2 | text loss |
|---|---|---|---|---|---|---|---|---|
{rows}

The losses are means over the tokens of held-out documents (`unseen_design`), in nats. The image
loss is that of images given their caption and 0, 1 or 2 retrieved documents. The text loss is that
of captions given their image and 2 documents.
"""

if __name__ == "__main__":
    app.run(main)
