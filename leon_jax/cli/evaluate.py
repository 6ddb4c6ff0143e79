"""Measures a model on held-out documents and prints the numbers as JSON.

    leon evaluate --checkpoint=runs/emoji/decoder/export --index=data/emoji_prepared

Without --checkpoint it measures the shipped model. What each number is: docs/results.md.
"""

import json
import sys
from statistics import fmean

from absl import flags

from leon_jax.config import UserError

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A model folder; the shipped one by default.")
_INDEX = flags.DEFINE_string("index", "data/emoji_prepared", "A prepared folder.")
_SPLIT = flags.DEFINE_enum(
    "split", "unseen_design", ["unseen_design", "unseen_concept"], "Which held-out documents."
)
_CANDIDATES = flags.DEFINE_integer("candidates", 50, "Documents that are told apart.")
_GROUPS = flags.DEFINE_integer("groups", 1, "Groups of so many documents to average over.")
_GUIDANCE = flags.DEFINE_float("guidance", 3.0, "Guidance weight of drawn pictures.")
_TOP_P = flags.DEFINE_float("top_p", 0.9, "Nucleus of drawn pictures.")
_CAPTION_DOCS = flags.DEFINE_multi_integer("caption_docs", [0], "Documents the ranker reads.")


def main(argv: list[str]) -> None:
    """Runs `leon evaluate`.

    Raises:
      UserError: a file is missing, or a number is out of range.
    """
    del argv
    import numpy as np

    from leon_jax.evaluate import demo
    from leon_jax.leon import Leon
    from leon_jax.retrieval.prepared import Prepared

    leon = Leon.load(_CHECKPOINT.value, _INDEX.value)
    source = Prepared(_INDEX.value).records(_SPLIT.value)
    count, groups = _CANDIDATES.value, _GROUPS.value
    if not 2 <= count <= len(source):
        raise UserError(f"--candidates is {count}; it must be 2 to {len(source)}")
    if not 1 <= groups <= len(source) // count:
        raise UserError(f"--groups is {groups}; it must be 1 to {len(source) // count}")
    every = [source[i] for i in range(len(source))]
    some = [every[start : start + count] for start in range(0, groups * count, count)]
    rebuilt = demo.reconstruct(leon, every)
    metrics: dict = {"tokenizer_psnr_db": rebuilt.psnr_db, "codes_used": rebuilt.codes_used}
    metrics["real_match"] = fmean(demo.real_match(leon, group) for group in some)
    _show(metrics)
    metrics["image_perplexity"] = {str(n): demo.image_perplexity(leon, every, n) for n in (0, 1, 2)}
    _show(metrics)
    metrics["prompt_match"] = {}
    for n in (0, 2):
        drawn = [
            demo.draw(leon, group, n, guidance=_GUIDANCE.value, top_p=_TOP_P.value)
            for group in some
        ]
        metrics["prompt_match"][str(n)] = fmean(demo.prompt_match(leon, group) for group in drawn)
        _show(metrics)
    metrics["caption_rank1"] = {}
    for n in _CAPTION_DOCS.value:
        ranks = np.concatenate([demo.caption_ranks(leon, group, n)[0] for group in some])
        metrics["caption_rank1"][str(n)] = float((ranks == 0).mean())
    print(json.dumps(metrics, indent=1))


def _show(metrics: dict) -> None:
    print(json.dumps(metrics), file=sys.stderr, flush=True)
