"""How an encoder scores pairs whose kinship is known, to choose its near-copy thresholds by eye.

    python -m leon_jax.retrieval.near_copy_thresholds \
        --encoder=runs/emoji/encoder/export/encoder.safetensors

prints how well it matches held-out pictures to captions, and how pairs of training documents score:
renderings of one picture, two designs of one concept, skin tones of one concept, and strangers.
docs/retrieval.md shows the result and what follows.
"""

import io
import itertools
import re
import sys
from collections.abc import Callable, Sequence

import jax
import numpy as np
import PIL.Image
from absl import app, flags
from jaxtyping import Float, UInt8

from leon_jax import sharding
from leon_jax.config import UserError
from leon_jax.datasets import demo
from leon_jax.documents import Document
from leon_jax.retrieval.encoder import RetrievalEncoder, normalise
from leon_jax.retrieval.selection import parts

_ENCODER = flags.DEFINE_string(
    "encoder", None, "encoder.safetensors, with text.json beside it; or the folder of a CLIP."
)
_DATA = flags.DEFINE_string("data", "data/emoji", "The emoji dataset.")
_PAIRS = flags.DEFINE_integer("pairs", 1000, "How many pairs of each kind are scored at most.")

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
ABOVE = (0.9, 0.95, 0.96, 0.97, 0.98, 0.99, 0.995)
_TONE = re.compile(r"-1F3F[B-F]")  # the five skin tone modifiers inside a concept


def accuracy(
    encoder: RetrievalEncoder, documents: Sequence[Document], among: int = 50
) -> dict[str, list[float]]:
    """How often a picture's own caption ranks first among `among`, and the reverse.

    The documents are cut, in order, into groups of `among`; what does not fill one is left out.

    Returns:
      For "image_to_text" and "text_to_image", the fraction of each group.
    """
    texts, images = zip(*map(parts, documents), strict=True)
    scores = encoder.embed_images(images) @ encoder.embed_texts(texts).T
    result: dict[str, list[float]] = {"image_to_text": [], "text_to_image": []}
    for start in range(0, len(documents) - among + 1, among):
        group = scores[start : start + among, start : start + among]
        own = np.arange(among)
        result["image_to_text"].append(float((group.argmax(1) == own).mean()))
        result["text_to_image"].append(float((group.argmax(0) == own).mean()))
    return result


def renderings(pixels: UInt8[np.ndarray, "h w 3"]) -> list[UInt8[np.ndarray, "h w 3"]]:
    """The same picture as JPEG of quality 60, at half size, moved by two pixels, and darker."""
    picture = PIL.Image.fromarray(pixels)
    buffer = io.BytesIO()
    picture.save(buffer, format="jpeg", quality=60)
    size = (picture.width // 2, picture.height // 2)
    small = picture.resize(size, PIL.Image.Resampling.BILINEAR)
    return [
        np.asarray(PIL.Image.open(buffer).convert("RGB")),
        np.asarray(small),
        np.roll(pixels, (2, 2), (0, 1)),
        (pixels * np.float32(0.9)).astype(np.uint8),
    ]


def kinships(
    documents: Sequence[Document], limit: int, seed: int = 0
) -> dict[str, list[tuple[int, int]]]:
    """Pairs of rows by kind: designs, tones and strangers; at most `limit` of each.

    A provenance key is "design/concept"; see `leon_jax.datasets.emoji.designs`.
    """
    rng = np.random.default_rng(seed)
    concepts: dict[str, list[int]] = {}
    tones: dict[str, list[int]] = {}
    for row, document in enumerate(documents):
        assert document.provenance is not None, "the emoji documents have one"
        design, _, concept = document.provenance.key.partition("/")
        concepts.setdefault(concept, []).append(row)
        if _TONE.search(concept):
            tones.setdefault(f"{design}/{_TONE.sub('', concept)}", []).append(row)
    found: dict[str, list[tuple[int, int]]] = {
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
        for kind, pairs in found.items()
    }


def distributions(
    encoder: RetrievalEncoder, documents: Sequence[Document], limit: int, seed: int = 0
) -> dict[str, dict[str, Float[np.ndarray, "pairs"]]]:
    """Cosines by what is compared and kind of pair.

    "documents" are compared for the near-copy thresholds of `SelectionConfig`, and "pictures" for
    those of `leon_jax.prepare.config.DuplicatesConfig`.
    """
    texts, images = zip(*map(parts, documents), strict=True)
    text = encoder.embed_texts(texts)
    pictures = encoder.embed_images(images)
    whole = normalise(text + pictures)
    result: dict[str, dict[str, np.ndarray]] = {"documents": {}, "pictures": {}}
    for kind, pairs in kinships(documents, limit, seed).items():
        left, right = np.array(pairs, np.int64).reshape(-1, 2).T
        for name, rows in (("documents", whole), ("pictures", pictures)):
            result[name][kind] = (rows[left] * rows[right]).sum(1)
    chosen = np.random.default_rng(seed).permutation(len(documents))[: max(1, limit // 4)]
    shown = [renderings(parts(documents[row])[1]) for row in chosen]
    copies = [encoder.embed_images(list(same)) for same in zip(*shown, strict=True)]
    result["documents"]["renderings"] = np.concatenate(
        [(whole[chosen] * normalise(copy + text[chosen])).sum(1) for copy in copies]
    )
    result["pictures"]["renderings"] = np.concatenate(
        [(pictures[chosen] * copy).sum(1) for copy in copies]
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
            shown = [f"{v:.2f}" for v in np.percentile(values, PERCENTILES)]
            shown += [f"{100 * (values > limit).mean():.1f}" for limit in ABOVE]
            write(f"| {kind} | {len(values)} | {' | '.join(shown)} |")


def main(argv: list[str]) -> None:
    """Measures the encoder named on the command line.

    Raises:
      UserError: a file is missing.
    """
    del argv
    if _ENCODER.value is None:
        raise UserError("--encoder is missing; it names an encoder.safetensors or a CLIP's folder")
    with jax.set_mesh(sharding.make_mesh()):
        encoder = RetrievalEncoder.load(_ENCODER.value)
        for split in ("unseen_design", "unseen_concept"):
            source = demo.source(split, _DATA.value)
            for way, groups in accuracy(encoder, list(source)).items():
                shown = ", ".join(f"{100 * group:.0f}" for group in groups)
                print(f"{split} {way}: right among 50, % of each group in order: {shown}")
        train = list(demo.source("train", _DATA.value))
        report(distributions(encoder, train, _PAIRS.value))


if __name__ == "__main__":
    try:
        app.run(main)
    except UserError as error:
        print(f"thresholds: {error}", file=sys.stderr)
        sys.exit(2)
