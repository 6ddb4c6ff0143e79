"""Defines the metrics of `leon evaluate` and `leon demo`, and formats them for display.

In JSON a share is 0 to 1. A metric `..._by_documents` maps the number of retrieved documents in
the prompt to a value.
"""

from collections.abc import Mapping

MEANINGS = {
    "candidates": "documents in each group; the matching metrics rank within a group",
    "tokenizer_psnr_db": "peak signal-to-noise ratio of held-out images after the image tokenizer, "
    "in decibels; mean over images",
    "codes_used_share": "share of the codebook that the held-out images use",
    "real_match_share": "share of real held-out images that the retrieval encoder matches to their "
    "own caption among all candidates; an estimate of the ceiling of prompt_match_share",
    "image_perplexity_by_documents": "perplexity per token of a held-out image given its caption",
    "prompt_match_share_by_documents": "share of generated images that the retrieval encoder "
    "matches to their own prompt among all candidates",
    "lpips_match_share_by_documents": "share of generated images whose nearest real image among "
    "all candidates, by LPIPS (VGG16), is the one of their own prompt",
    "caption_rank1_share_by_documents": "share of held-out images whose own caption is the most "
    "likely of all candidates; each caption follows the documents that it retrieves",
    "seconds": "wall-clock time of the whole demo",
}

Number = float | Mapping[str, float]


def format_metric(name: str, value: Number) -> str:
    """Formats a metric with its unit.

    Args:
      name: a key of `MEANINGS`.
      value: the number, or a mapping from the number of retrieved documents to a number.
    """
    if isinstance(value, Mapping):
        return "; ".join(
            f"{docs} documents: {format_metric(name, number)}" for docs, number in value.items()
        )
    if "_share" in name:
        return f"{100 * value:.1f} %"
    if name.endswith("_db"):
        return f"{value:.2f} dB"
    return f"{value:.0f} s" if name == "seconds" else f"{value:.4g}"
