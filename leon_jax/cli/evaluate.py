"""Evaluates a model on held-out documents and prints the metrics as JSON.

    leon evaluate --index=data/emoji_prepared
    leon evaluate --model=leon_jax/weights/emoji --index=data/emoji_prepared --groups=4

--model names a folder with decoder.safetensors, tokenizer.safetensors, encoder.safetensors and
text.json. The default is the shipped model. --index names a folder written by `leon prepare`.
Each metric is also printed on stderr with its unit and its definition as soon as it is known.
"""

import json
import sys
from statistics import fmean

from absl import flags

from leon_jax.config import UserError

_MODEL = flags.DEFINE_string("model", None, "A model folder; by default the shipped model.")
_INDEX = flags.DEFINE_string("index", "data/emoji_prepared", "A prepared folder.")
_SPLIT = flags.DEFINE_enum(
    "split", "unseen_design", ["unseen_design", "unseen_concept"], "The held-out split."
)
_CANDIDATES = flags.DEFINE_integer(
    "candidates", 50, "Documents in each group; the matching metrics rank within a group."
)
_GROUPS = flags.DEFINE_integer("groups", 1, "Groups of documents; metrics are their mean.")
_GUIDANCE = flags.DEFINE_float("guidance", 3.0, "Classifier-free guidance weight of images.")
_TOP_P = flags.DEFINE_float("top_p", 0.9, "Nucleus sampling probability of images, above 0 to 1.")
_CAPTION_DOCS = flags.DEFINE_multi_integer(
    "caption_docs",
    [0],
    "Documents retrieved before each ranked caption; may be repeated, for several results.",
)


def main(argv: list[str]) -> None:
    """Runs `leon evaluate`.

    Raises:
      UserError: a file is missing, or a number is out of range.
    """
    del argv
    import numpy as np

    from leon_jax.evaluate import measurements
    from leon_jax.evaluate.meanings import MEANINGS, Number, format_metric
    from leon_jax.leon import Leon
    from leon_jax.retrieval.prepared_folder import PreparedFolder

    leon = Leon.load(_MODEL.value, _INDEX.value)
    source = PreparedFolder(_INDEX.value).records(_SPLIT.value)
    size, num_groups = _CANDIDATES.value, _GROUPS.value
    if not 2 <= size <= len(source):
        raise UserError(f"--candidates is {size}; it must be 2 to {len(source)}")
    if not 1 <= num_groups <= len(source) // size:
        raise UserError(f"--groups is {num_groups}; it must be 1 to {len(source) // size}")
    documents = [source[i] for i in range(len(source))]
    groups = [documents[start : start + size] for start in range(0, num_groups * size, size)]
    reconstruction = measurements.reconstruct(leon, documents)
    metrics: dict[str, Number] = {}

    def record(name: str, value: Number) -> None:
        metrics[name] = value
        line = f"{name}: {format_metric(name, value)} ({MEANINGS[name]})"
        print(line, file=sys.stderr, flush=True)

    record("candidates", size)
    record("tokenizer_psnr_db", reconstruction.psnr_db)
    record("codes_used_share", reconstruction.codes_used)
    record("real_match_share", fmean(measurements.real_match(leon, group) for group in groups))
    record(
        "image_perplexity_by_documents",
        {str(docs): measurements.image_perplexity(leon, documents, docs) for docs in (0, 1, 2)},
    )
    matches = {}
    for docs in (0, 2):
        generated = (
            measurements.generate(leon, group, docs, guidance=_GUIDANCE.value, top_p=_TOP_P.value)
            for group in groups
        )
        matches[str(docs)] = fmean(measurements.prompt_match(leon, group) for group in generated)
    record("prompt_match_share_by_documents", matches)
    rank1_shares = {}
    for docs in _CAPTION_DOCS.value:
        ranks = np.concatenate(
            [measurements.caption_ranks(leon, group, docs)[0] for group in groups]
        )
        rank1_shares[str(docs)] = float((ranks == 0).mean())
    record("caption_rank1_share_by_documents", rank1_shares)
    print(json.dumps(metrics, indent=1))
