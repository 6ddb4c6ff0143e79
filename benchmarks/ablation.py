"""What each rule of retrieval is worth: the demo's decoder, trained with one more at a time.

    python -m benchmarks.ablation --steps=2000 --workdir=runs/ablation

Prepares the emoji four times, differing in nothing but how neighbours are found; trains a decoder
on each from the same start; measures each as `leon evaluate` does, with the documents that its own
rules choose. Finished parts are kept, so it may be stopped and started again. Writes
docs/ablation.md.
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
_VARIANTS = flags.DEFINE_integer("variants", 16, "Variants of each picture in training.", 1)
_SEED = flags.DEFINE_integer("seed", 0, "Of initialisation, order and masks; the same for all.")
_DATA = flags.DEFINE_string("data_dir", "data/emoji", "The emoji drawings; made if missing.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/ablation", "Where everything goes.")
_PAGE = flags.DEFINE_string("page", "docs/ablation.md", "The page that is written.")

NEVER = 2.0  # no inner product of unit vectors reaches it


def rules(full: dict) -> dict[str, dict]:
    """The settings of selection, each with one rule more, up to those of the model folder."""
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
    """Runs what is not there yet, then writes the page."""
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
            # The documents are the same, so their variants are.
            for path in base.glob("*.variants.npy"):
                if not (prepared / path.name).exists():
                    os.link(path, prepared / path.name)
        base = base or prepared
        results[name] = measure(folder, prepared, model)
        print(name, json.dumps(results[name]), flush=True)
    pathlib.Path(_PAGE.value).write_text(page(results))


def prepare(folder: pathlib.Path, out: pathlib.Path, selection: dict, with_variants: bool) -> None:
    """A prepared folder with these rules."""
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
    """Trains a decoder on a prepared folder and evaluates it."""
    done = folder / "metrics.json"
    if done.exists():
        return json.loads(done.read_text())
    run = folder / "run"
    leon(
        "train", "--config=configs/emoji/decoder.py", f"--workdir={run}",
        f"--config.steps={_STEPS.value}", f"--config.seed={_SEED.value}",
        f"--config.data.folder={prepared}", f"--config.data.variants={_VARIANTS.value}",
        f"--config.data.text={model / 'text.json'}", "--config.samples.image=",
        # Most examples read something, as in the second stage of the shipped decoder.
        "--config.data.retrieved=(0.1, 0.3, 0.4, 0.2)",
    )  # fmt: skip
    whole = folder / "model"
    shutil.copytree(model, whole, dirs_exist_ok=True)
    shutil.copyfile(run / "export" / "decoder.safetensors", whole / "decoder.safetensors")
    printed = leon("evaluate", f"--checkpoint={whole}", f"--index={prepared}", "--groups=4")
    metrics = json.loads(printed)
    last = (run / "metrics.jsonl").read_text().splitlines()[-20:]
    metrics["training_loss"] = sum(json.loads(line)["loss"] for line in last) / len(last)
    done.write_text(json.dumps(metrics))
    return metrics


def leon(verb: str, *arguments: str) -> str:
    """Runs the command and returns what it printed."""
    command = [sys.executable, "-m", "leon_jax.cli.main", verb, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def page(results: dict[str, dict]) -> str:
    """docs/ablation.md."""
    rows = []
    for name, metrics in results.items():
        perplexity = [f"{metrics['image_perplexity_by_documents'][n]:.2f}" for n in "012"]
        match = [f"{100 * metrics['prompt_match_share_by_documents'][n]:.1f}" for n in "02"]
        rank = f"{100 * metrics['caption_rank1_share_by_documents']['0']:.1f}"
        loss = f"{metrics['training_loss']:.3f}"
        rows.append(f"| {' | '.join([name, loss, *perplexity, *match, rank])} |")
    return f"""# What the rules of retrieval are worth

Written by `python -m benchmarks.ablation --steps={_STEPS.value} --variants={_VARIANTS.value} \
--seed={_SEED.value}`.

The demonstration's decoder ({_STEPS.value} steps from nothing, mostly with one or two documents to
read), trained on four prepared folders that differ in nothing but the rules by which neighbours are
found ([retrieval](retrieval.md)); each row has one rule more. Each model is measured on the 200
held-out pictures of `unseen_design`, reading the documents that its own rules choose.

| rules | training loss | perplexity, 0 read | 1 | 2 | match %, 0 read | 2 | caption first, % |
|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}

*Relevance*: documents like the whole query, the most alike first. *Modality*: found through its
text and its picture, each by itself. *Diversity*: near copies of the query and of each other are
skipped, and sources take turns. *Query dropout*: a fifth of the query's text is dropped in
training.

*Perplexity*: of a held-out picture's tokens given its caption, with 0, 1 and 2 documents read.
*Match*: drawn pictures that the retrieval encoder matches to their own prompt among 50; its
standard error is about three points. *Caption first*: pictures for which their own caption is the
likeliest of 50, without documents.
"""


if __name__ == "__main__":
    app.run(main)
