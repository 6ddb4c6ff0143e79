"""Ablates the retrieval rules: trains a decoder like the shipped one with one more rule at a time.

    python -m benchmarks.ablation --steps=2000 --workdir=runs/ablation

Prepares the emoji four times with different rules for neighbours, trains a decoder on each from the
same initialisation, and evaluates each with the documents that its own rules select. Run it again
to resume an interrupted run. Writes docs/ablation.md.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

from absl import app, flags

from leon_jax.config import to_dict
from leon_jax.generate import retriever
from leon_jax.model_folder import shipped_folder

_STEPS = flags.DEFINE_integer("steps", 2000, "Training steps of each decoder.", 1)
_VARIANTS = flags.DEFINE_integer("variants", 16, "Variants of each training image.", 1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of initialisation, order and masks.")
_DATA = flags.DEFINE_string(
    "data_dir", "data/emoji", "The folder of emoji images; rendered if missing."
)
_WORKDIR = flags.DEFINE_string("workdir", "runs/ablation", "The folder of all results.")
_PAGE = flags.DEFINE_string("page", "docs/ablation.md", "The page to write.")

NEVER = 2.0  # above any inner product of unit vectors


def rules(full: dict) -> dict[str, dict]:
    """Returns selection settings with one more rule each, up to the full settings."""
    bare = full | {
        "through_parts": False,
        "near_copy_query": NEVER,
        "near_copy_document": NEVER,
        "alternate_sources": False,
        "query_dropout": 0.0,
    }
    modality = bare | {"through_parts": True}
    diversity = full | {"query_dropout": 0.0}
    return {
        "relevance": bare,
        "+ modality": modality,
        "+ diversity": diversity,
        "+ query dropout": full,
    }


def main(argv: list[str]) -> None:
    """Runs the missing parts, then writes the page."""
    del argv
    work, model = pathlib.Path(_WORKDIR.value).absolute(), shipped_folder()
    work.mkdir(parents=True, exist_ok=True)
    leon("prepare", f"--data_dir={_DATA.value}", "--dataset_only")
    results, base = {}, None
    for name, selection in rules(to_dict(retriever.selection(model))).items():
        folder = work / name.replace("+ ", "plus_").replace(" ", "_")
        folder.mkdir(exist_ok=True)
        prepared = folder / "prepared"
        prepare(folder, prepared, selection, base is None)
        if base is not None:
            # The documents are the same, so reuse their variants.
            for path in base.glob("*.variants.npy"):
                if not (prepared / path.name).exists():
                    os.link(path, prepared / path.name)
        base = base or prepared
        results[name] = measure(folder, prepared, model)
        print(name, json.dumps(results[name]), flush=True)
    pathlib.Path(_PAGE.value).write_text(page(results))


def prepare(folder: pathlib.Path, out: pathlib.Path, selection: dict, with_variants: bool) -> None:
    """Writes a prepared folder with these rules."""
    config = folder / "prepare.py"
    sources = [
        {"kind": "emoji", "path": os.path.abspath(_DATA.value), "split": split}
        for split in ("train", "unseen_design", "unseen_concept")
    ]
    values = {
        "sources": sources,
        "picture_side": 96,
        "duplicates": {"exact": False},
        "selection": selection,
        "variants": _VARIANTS.value if with_variants else 1,
    }
    config.write_text(
        "from ml_collections import ConfigDict\n\n\ndef get_config():\n"
        f"    return ConfigDict({values!r})\n"
    )
    leon("prepare", f"--config={config}", f"--out={out}")


def measure(folder: pathlib.Path, prepared: pathlib.Path, model: pathlib.Path) -> dict:
    """Trains a decoder on a prepared folder and returns its metrics."""
    metrics_path = folder / "metrics.json"
    if metrics_path.exists():
        return json.loads(metrics_path.read_text())
    run = folder / "run"
    leon(
        "train", "--config=configs/emoji/decoder.py", f"--workdir={run}",
        f"--config.steps={_STEPS.value}", f"--config.seed={_SEED.value}",
        f"--config.data.folder={prepared}", f"--config.data.variants={_VARIANTS.value}",
        f"--config.data.text={model / 'text.json'}", "--config.samples.image=",
    )  # fmt: skip
    model_folder = folder / "model"
    shutil.copytree(model, model_folder, dirs_exist_ok=True)
    shutil.copyfile(run / "export" / "decoder.safetensors", model_folder / "decoder.safetensors")
    output = leon("evaluate", f"--model={model_folder}", f"--index={prepared}", "--groups=4")
    metrics = json.loads(output)
    lines = (run / "metrics.jsonl").read_text().splitlines()[-20:]
    metrics["training_loss"] = sum(json.loads(line)["loss"] for line in lines) / len(lines)
    metrics_path.write_text(json.dumps(metrics))
    return metrics


def leon(verb: str, *arguments: str) -> str:
    """Runs a `leon` command and returns its stdout."""
    command = [sys.executable, "-m", "leon_jax.cli.main", verb, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def page(results: dict[str, dict]) -> str:
    """Returns the text of docs/ablation.md."""
    rows = []
    for name, metrics in results.items():
        perplexity = [f"{metrics['image_perplexity_by_documents'][n]:.2f}" for n in "012"]
        match = [f"{100 * metrics['prompt_match_share_by_documents'][n]:.1f}" for n in "02"]
        rank = f"{100 * metrics['caption_rank1_share_by_documents']['0']:.1f}"
        loss = f"{metrics['training_loss']:.3f}"
        rows.append(f"| {' | '.join([name, loss, *perplexity, *match, rank])} |")
    return f"""# The effect of each retrieval rule

```bash
python -m benchmarks.ablation --steps={_STEPS.value} --variants={_VARIANTS.value} \
--seed={_SEED.value}
```

The benchmark trains a decoder like the shipped one on four prepared folders, from scratch, for
{_STEPS.value:,} steps each. Most training examples have one or two retrieved documents. The folders
differ only in the rules that select neighbours ([retrieval](retrieval.md)). Each row of the table
has one more rule. Each model is measured on the 200 held-out images of `unseen_design`. It reads
the documents that its own rules select.

| rules | training loss | perplexity, 0 read | 1 | 2 | match %, 0 read | 2 | caption first, % |
|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}

- *Relevance*: documents most similar to the whole query, best first.
- *Modality*: documents are found through the text and through the image of the query, each by
  itself.
- *Diversity*: near copies of the query and of each other are skipped, and sources take turns.
- *Query dropout*: a fifth of the query's text is dropped in training.

The columns:

- *Perplexity* of the tokens of a held-out image given its caption, with 0, 1 and 2 documents read.
- *Match*: the share of generated images that the retrieval encoder matches to their own prompt
  among 50. Its standard error is about three points.
- *Caption first*: the share of images whose own caption is the likeliest of 50, without documents.
"""


if __name__ == "__main__":
    app.run(main)
