"""Defines the metrics of `leon evaluate` and `leon demo`: label, meaning and format of each.

In JSON a share is 0 to 1. A metric `..._by_documents` maps the number of retrieved documents in
the prompt to a value.
"""

from collections.abc import Mapping

LABELS = {
    "candidates": "Candidates",
    "tokenizer_psnr_db": "PSNR of the image tokenizer",
    "codes_used_share": "Codes in use",
    "lpips_reconstruction_share": "Reconstructions recognised (LPIPS)",
    "real_match_share": "Real images recognised (encoder)",
    "image_perplexity_by_documents": "Perplexity of an image token",
    "retrieval_gain_by_documents": "Gain of a further document",
    "retrieval_gain_error_by_documents": "Standard error of this gain",
    "prompt_match_share_by_documents": "Generated images recognised (encoder)",
    "lpips_match_share_by_documents": "Generated images recognised (LPIPS)",
    "lpips_beyond_documents_share": "Generated images nearer to the truth than to documents",
    "lpips_copy_share": "Retrieved documents recognised (LPIPS)",
    "caption_rank1_share_by_documents": "True caption is the likeliest",
    "caption_exact_share": "Generated captions that are exact",
    "caption_concept_share": "Generated captions that name the concept",
    "judge": "Generated images recognised (LPIPS)",
    "judge_copy": "Retrieved documents recognised (LPIPS)",
    "seconds": "Time of the demo",
}
MEANINGS = {
    "candidates": "documents in each group; the matching metrics rank within a group",
    "tokenizer_psnr_db": "peak signal-to-noise ratio of held-out images after the image tokenizer, "
    "in decibels; mean over images",
    "codes_used_share": "share of the codebook that the held-out images use",
    "lpips_reconstruction_share": "share of held-out images that are nearest to themselves among "
    "all candidates, by LPIPS (VGG16), after the image tokenizer; about the most that generated "
    "images can reach",
    "real_match_share": "share of real held-out images that the retrieval encoder matches to their "
    "own caption among all candidates; it shows how reliable the encoder is as a judge",
    "image_perplexity_by_documents": "perplexity per token of a held-out image given its caption",
    "retrieval_gain_by_documents": "how many nats less a token of a held-out image costs than with "
    "one retrieved document less",
    "retrieval_gain_error_by_documents": "its standard error over images",
    "prompt_match_share_by_documents": "share of generated images that the retrieval encoder "
    "matches to their own prompt among all candidates",
    "lpips_match_share_by_documents": "share of generated images whose nearest real image among "
    "all candidates, by LPIPS (VGG16), is the one of their own prompt",
    "lpips_beyond_documents_share": "share of images, generated with documents, that are nearer to "
    "the held-out image of their prompt than to every document that they read, by LPIPS (VGG16)",
    "lpips_copy_share": "share of prompts whose nearest retrieved document, unchanged, would be "
    "recognised by LPIPS like a generated image; a model that only copies reaches it",
    "caption_rank1_share_by_documents": "share of held-out images whose own caption is the most "
    "likely of all candidates; each caption follows the documents that it retrieves",
    "caption_exact_share": "share of held-out images whose most likely caption is their own",
    "caption_concept_share": "share of held-out images whose most likely caption is one of theirs, "
    "in any language or wording, with or without the style",
    "judge": "share of generated images whose nearest real image among all candidates, by LPIPS "
    "(VGG16), is the one of their own prompt; seen: designs that were trained on, unseen: held-out "
    "designs",
    "judge_copy": "the same share for the nearest retrieved document of each prompt, unchanged; a "
    "model that only copies reaches it",
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
            f"{_group(key)}: {format_metric(name, number)}" for key, number in value.items()
        )
    if "_share" in name or name.startswith("judge"):
        return f"{100 * value:.1f} %"
    if name.endswith("_db"):
        return f"{value:.2f} dB"
    return f"{value:.0f} s" if name == "seconds" else f"{value:.4g}"


def _group(key: str) -> str:
    """Formats a key of a metric: "2" is "2 documents", "seen_2" is "seen, 2 documents"."""
    *words, docs = key.split("_")
    if not docs.isdigit():
        return key
    return ", ".join([*words, f"{docs} document{'s' * (docs != '1')}"])
