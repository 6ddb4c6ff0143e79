"""Measures a model on held-out documents and prints the numbers as JSON.

    leon evaluate --index=data/emoji_prepared
    leon evaluate --model=leon_jax/weights/emoji --index=data/emoji_prepared --groups=4

A model folder holds decoder.safetensors, tokenizer.safetensors, encoder.safetensors and text.json.
Without --model the model that comes with the package is measured. `leon prepare` makes the
index. Every number is also printed with its unit and its meaning while it is measured.
"""

import json
import sys
from statistics import fmean

from absl import flags

from leon_jax.config import UserError

_MODEL = flags.DEFINE_string(
    "model", None, "A model folder; by default the model that comes with the package."
)
_INDEX = flags.DEFINE_string("index", "data/emoji_prepared", "A prepared folder.")
_SPLIT = flags.DEFINE_enum(
    "split", "unseen_design", ["unseen_design", "unseen_concept"], "Which held-out documents."
)
_CANDIDATES = flags.DEFINE_integer("candidates", 50, "Documents that are told apart.")
_GROUPS = flags.DEFINE_integer("groups", 1, "Groups of --candidates documents to average over.")
_GUIDANCE = flags.DEFINE_float("guidance", 3.0, "Guidance weight of generated images.")
_TOP_P = flags.DEFINE_float(
    "top_p", 0.9, "Images are sampled from the likeliest tokens of this total probability."
)
_CAPTION_DOCS = flags.DEFINE_multi_integer(
    "caption_docs",
    [0],
    "Documents that are read before each caption that is ranked.",
)


def main(argv: list[str]) -> None:
    """Runs `leon evaluate`.

    Raises:
      UserError: a file is missing, or a number is out of range.
    """
    del argv
    import numpy as np

    from leon_jax.evaluate import measurements
    from leon_jax.evaluate.meanings import MEANINGS, Number, shown
    from leon_jax.leon import Leon
    from leon_jax.retrieval.prepared_folder import PreparedFolder

    leon = Leon.load(_MODEL.value, _INDEX.value)
    source = PreparedFolder(_INDEX.value).records(_SPLIT.value)
    count, groups = _CANDIDATES.value, _GROUPS.value
    if not 2 <= count <= len(source):
        raise UserError(f"--candidates is {count}; it must be 2 to {len(source)}")
    if not 1 <= groups <= len(source) // count:
        raise UserError(f"--groups is {groups}; it must be 1 to {len(source) // count}")
    every = [source[i] for i in range(len(source))]
    some = [every[start : start + count] for start in range(0, groups * count, count)]
    rebuilt = measurements.reconstruct(leon, every)
    metrics: dict[str, Number] = {}

    def measured(name: str, value: Number) -> None:
        metrics[name] = value
        line = f"{name}: {shown(name, value)} ({MEANINGS[name]})"
        print(line, file=sys.stderr, flush=True)

    measured("candidates", count)
    measured("tokenizer_psnr_db", rebuilt.psnr_db)
    measured("codes_used_share", rebuilt.codes_used)
    measured("real_match_share", fmean(measurements.real_match(leon, group) for group in some))
    measured(
        "image_perplexity_by_documents",
        {str(docs): measurements.image_perplexity(leon, every, docs) for docs in (0, 1, 2)},
    )
    matches = {}
    for docs in (0, 2):
        generated = (
            measurements.draw(leon, group, docs, guidance=_GUIDANCE.value, top_p=_TOP_P.value)
            for group in some
        )
        matches[str(docs)] = fmean(measurements.prompt_match(leon, group) for group in generated)
    measured("prompt_match_share_by_documents", matches)
    firsts = {}
    for docs in _CAPTION_DOCS.value:
        ranks = np.concatenate([measurements.caption_ranks(leon, group, docs)[0] for group in some])
        firsts[str(docs)] = float((ranks == 0).mean())
    measured("caption_rank1_share_by_documents", firsts)
    print(json.dumps(metrics, indent=1))
