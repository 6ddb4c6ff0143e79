"""What each number of `leon evaluate` and `leon demo` is, and how it is written for people.

The same numbers are printed as JSON. There a share is 0 to 1, and `..._by_documents` is a group by
how many retrieved documents the model reads first.
"""

from collections.abc import Mapping

MEANINGS = {
    "candidates": "documents that are told apart",
    "tokenizer_psnr_db": "peak signal-to-noise ratio of held-out images after the image tokenizer, "
    "in decibels; the mean over images",
    "codes_used_share": "share of the codebook that the held-out images use",
    "real_match_share": "share of real held-out images that the retrieval encoder matches to their "
    "own caption among all candidates: how far the encoder can judge generated images",
    "image_perplexity_by_documents": "perplexity of a held-out image's token given the caption; 1 "
    "is certainty",
    "prompt_match_share_by_documents": "share of generated images that the retrieval encoder "
    "matches to their own prompt among all candidates",
    "caption_rank1_share_by_documents": "share of held-out images for which no other candidate's "
    "caption is likelier than their own; each caption is read after the documents that it finds",
    "seconds": "wall-clock time of the whole demo",
}

Number = float | Mapping[str, float]


def shown(name: str, value: Number) -> str:
    """A number with its unit, or one for each number of documents.

    Args:
      name: a key of `MEANINGS`.
      value: the number, or numbers by how many documents are read first.
    """
    if isinstance(value, Mapping):
        return "; ".join(f"{docs} documents: {shown(name, one)}" for docs, one in value.items())
    if "_share" in name:
        return f"{100 * value:.1f} %"
    if name.endswith("_db"):
        return f"{value:.2f} dB"
    return f"{value:.0f} s" if name == "seconds" else f"{value:.4g}"
