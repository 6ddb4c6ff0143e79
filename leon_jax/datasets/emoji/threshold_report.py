r"""Measures how an encoder scores pairs of known kinds, for choosing its near-copy thresholds.

    python -m leon_jax.datasets.emoji.threshold_report \
        --encoder=runs/emoji/encoder/export/encoder.safetensors

prints how well the encoder matches held-out images to captions, and the scores of pairs of training
documents: renderings of one image, two designs of one concept, skin tones of one concept, and
unrelated documents ("strangers"). docs/retrieval.md shows the result and discusses it.
"""

import itertools
import re
import sys
from collections.abc import Callable, Sequence

import jax
import numpy as np
from absl import app, flags
from jaxtyping import Float

from leon_jax import sharding
from leon_jax.config import UserError
from leon_jax.datasets import demo
from leon_jax.documents import Document
from leon_jax.retrieval.encoder import RetrievalEncoder, normalise
from leon_jax.retrieval.near_copies import renderings
from leon_jax.retrieval.neighbour_selection import text_and_pixels

_ENCODER = flags.DEFINE_string(
    "encoder", None, "encoder.safetensors, with text.json beside it; or a CLIP folder."
)
_DATA = flags.DEFINE_string("data", "data/emoji", "The emoji dataset.")
_PAIRS = flags.DEFINE_integer("pairs", 1000, "The largest number of pairs of each kind.")

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
ABOVE = (0.9, 0.95, 0.96, 0.97, 0.98, 0.99, 0.995)
_TONE = re.compile(r"-1F3F[B-F]")  # the five skin tone modifiers inside a concept


def accuracy(
    encoder: RetrievalEncoder, documents: Sequence[Document], among: int = 50
) -> dict[str, list[float]]:
    """Returns how often an image's caption ranks first among `among` captions, and the reverse.

    The documents are cut, in order, into groups of `among`. An incomplete group is left out.

    Returns:
      For "image_to_text" and "text_to_image", the fraction of each group.
    """
    texts, images = zip(*map(text_and_pixels, documents), strict=True)
    scores = encoder.embed_images(images) @ encoder.embed_texts(texts).T
    result: dict[str, list[float]] = {"image_to_text": [], "text_to_image": []}
    for start in range(0, len(documents) - among + 1, among):
        group = scores[start : start + among, start : start + among]
        expected = np.arange(among)
        result["image_to_text"].append(float((group.argmax(1) == expected).mean()))
        result["text_to_image"].append(float((group.argmax(0) == expected).mean()))
    return result


def pairs_by_kind(
    documents: Sequence[Document], limit: int, seed: int = 0
) -> dict[str, list[tuple[int, int]]]:
    """Returns pairs of rows by kind: designs, skin tones and strangers; at most `limit` of each.

    A provenance key is "design/concept"; see `leon_jax.datasets.emoji.designs`.
    """
    rng = np.random.default_rng(seed)
    concepts: dict[str, list[int]] = {}
    tones: dict[str, list[int]] = {}
    for row, document in enumerate(documents):
        assert document.provenance is not None, "every emoji document has one"
        design, _, concept = document.provenance.key.partition("/")
        concepts.setdefault(concept, []).append(row)
        if _TONE.search(concept):
            tones.setdefault(f"{design}/{_TONE.sub('', concept)}", []).append(row)
    pairs_of: dict[str, list[tuple[int, int]]] = {
        "two designs": [(rows[0], rows[1]) for rows in concepts.values() if len(rows) > 1],
        "skin tones": [
            (one, other) for rows in tones.values() for one, other in itertools.pairwise(rows)
        ],
        "strangers": [
            (int(one), int(other))
            for one, other in rng.integers(0, len(documents), (limit, 2))
            if one != other
        ],
    }
    return {
        kind: [pairs[i] for i in rng.permutation(len(pairs))[:limit]]
        for kind, pairs in pairs_of.items()
    }


def distributions(
    encoder: RetrievalEncoder, documents: Sequence[Document], limit: int, seed: int = 0
) -> dict[str, dict[str, Float[np.ndarray, "pairs"]]]:
    """Returns the cosines of pairs, by what is compared and by kind of pair.

    "documents" are compared for the near-copy thresholds of `SelectionConfig`, "images" for those
    of `leon_jax.prepare.config.DuplicatesConfig`.
    """
    texts, images = zip(*map(text_and_pixels, documents), strict=True)
    text_rows = encoder.embed_texts(texts)
    image_rows = encoder.embed_images(images)
    document_rows = normalise(text_rows + image_rows)
    result: dict[str, dict[str, np.ndarray]] = {"documents": {}, "images": {}}
    for kind, pairs in pairs_by_kind(documents, limit, seed).items():
        first, second = np.array(pairs, np.int64).reshape(-1, 2).T
        for name, rows in (("documents", document_rows), ("images", image_rows)):
            result[name][kind] = (rows[first] * rows[second]).sum(1)
    chosen = np.random.default_rng(seed).permutation(len(documents))[: max(1, limit // 4)]
    copies_of = [renderings(text_and_pixels(documents[row])[1]) for row in chosen]
    copies = [encoder.embed_images(list(copy)) for copy in zip(*copies_of, strict=True)]
    result["documents"]["renderings"] = np.concatenate(
        [(document_rows[chosen] * normalise(copy + text_rows[chosen])).sum(1) for copy in copies]
    )
    result["images"]["renderings"] = np.concatenate(
        [(image_rows[chosen] * copy).sum(1) for copy in copies]
    )
    return result


def report(
    scores: dict[str, dict[str, np.ndarray]], write: Callable[[str], object] = print
) -> None:
    """Writes percentiles, and the shares above some thresholds, as Markdown tables."""
    for name, kinds in scores.items():
        write(f"\n{name}\n")
        above = " | ".join(f"above {limit}, %" for limit in ABOVE)
        write("| pairs | n | " + " | ".join(f"p{p}" for p in PERCENTILES) + f" | {above} |")
        write("|---" * (len(PERCENTILES) + len(ABOVE) + 2) + "|")
        for kind, values in kinds.items():
            cells = [f"{v:.2f}" for v in np.percentile(values, PERCENTILES)]
            cells += [f"{100 * (values > limit).mean():.1f}" for limit in ABOVE]
            write(f"| {kind} | {len(values)} | {' | '.join(cells)} |")


def main(argv: list[str]) -> None:
    """Measures the encoder named on the command line.

    Raises:
      UserError: a file is missing.
    """
    del argv
    if _ENCODER.value is None:
        raise UserError("--encoder is missing; it names an encoder.safetensors or a CLIP folder")
    with jax.set_mesh(sharding.make_mesh()):
        encoder = RetrievalEncoder.load(_ENCODER.value)
        for split in ("unseen_design", "unseen_concept"):
            source = demo.source(split, _DATA.value)
            for direction, groups in accuracy(encoder, list(source)).items():
                percentages = ", ".join(f"{100 * group:.0f}" for group in groups)
                print(f"{split} {direction}: correct among 50, % of each group: {percentages}")
        train = list(demo.source("train", _DATA.value))
        report(distributions(encoder, train, _PAIRS.value))


if __name__ == "__main__":
    try:
        app.run(main)
    except UserError as error:
        print(f"threshold_report: {error}", file=sys.stderr)
        sys.exit(2)
