"""Writes the report of `leon demo` and of `leon evaluate`: one HTML file with embedded images."""

import html
import json
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, UInt8

from leon_jax import html_page, storage
from leon_jax.documents import Document
from leon_jax.evaluate.meanings import LABELS, MEANINGS, Number, format_metric
from leon_jax.html_page import image_tag, table
from leon_jax.leon import GeneratedImage, credit

_STYLE = """
img { width: 96px; height: 96px; border: 1px solid #eee; margin: 2px }
figure { margin: 0; width: 10rem; overflow-wrap: anywhere }
.read { display: flex; gap: .75rem }
.gallery { display: flex; flex-wrap: wrap; gap: 1rem }
.gallery figure { width: 128px; font-size: .85rem; line-height: 1.3 }
.gallery img { width: 128px; height: 128px; margin: 0 }
"""


def retrieved(documents: Sequence[Document]) -> str:
    """Returns the images of retrieved documents with captions, licences and credits, as HTML."""
    if not documents:
        return "<small>none</small>"
    figures = []
    for document in documents:
        origin = credit(document)
        caption = html.escape(origin["caption"])
        note = f"{origin['key']}, {origin['licence']}"
        if origin["attribution"]:
            note += f": {origin['attribution']}"
        figures.append(
            f"<figure>{image_tag(document.pixels, origin['caption'])}"
            f"<figcaption>{caption}<small>{html.escape(note)}</small></figcaption></figure>"
        )
    return f'<div class="read">{"".join(figures)}</div>'


def generated_images(
    documents: Sequence[Document],
    without_retrieval: Sequence[GeneratedImage],
    with_retrieval: Sequence[GeneratedImage],
    num_docs: int = 2,
) -> str:
    """Returns a table of prompts, held-out images, generated images and retrieved documents.

    Args:
      documents: held-out documents, whose captions are the prompts.
      without_retrieval: an image for each document, generated without retrieved documents.
      with_retrieval: an image for each document, generated with retrieved documents.
      num_docs: the number of retrieved documents.
    """
    rows = []
    for document, plain, augmented in zip(
        documents, without_retrieval, with_retrieval, strict=True
    ):
        rows.append(
            [
                html.escape(plain.prompt),
                image_tag(document.pixels, f"held-out image: {plain.prompt}"),
                image_tag(plain.image, f"generated without documents: {plain.prompt}"),
                image_tag(augmented.image, f"generated with documents: {plain.prompt}"),
                retrieved(augmented.retrieved),
            ]
        )
    return table(
        [
            "Prompt",
            "Held-out image",
            "Generated, 0 documents",
            f"Generated, {num_docs} documents",
            "Retrieved",
        ],
        rows,
    )


def gallery(images: Sequence[GeneratedImage]) -> str:
    """Returns generated images in a row, each above its prompt, as HTML."""
    figures = (
        f"<figure>{image_tag(image.image, image.prompt)}"
        f"<figcaption>{html.escape(image.prompt)}</figcaption></figure>"
        for image in images
    )
    return f'<div class="gallery">{"".join(figures)}</div>'


def captions(documents: Sequence[Document], generated: Sequence[tuple[str, str]]) -> str:
    """Returns a table of held-out images and their captions.

    Args:
      documents: held-out documents.
      generated: (caption without retrieval, caption with retrieval) of each document.
    """
    rows = []
    for document, (plain, augmented) in zip(documents, generated, strict=True):
        image = image_tag(document.pixels, document.text)
        rows.append([image, *(html.escape(text) for text in (plain, augmented, document.text))])
    head = ["Held-out image", "Caption, 0 documents", "Caption, 2 documents", "True caption"]
    return table(head, rows)


def reconstructions(
    images: tuple[UInt8[np.ndarray, "n r r 3"], UInt8[np.ndarray, "n r r 3"]], count: int = 10
) -> str:
    """Returns the first images, and below them the same images after the image tokenizer."""
    lines = (
        "".join(image_tag(pixels, "held-out image") for pixels in row[:count]) for row in images
    )
    return (
        "<p>Top: held-out images. Bottom: the same images after encoding and decoding.</p>"
        + "<br>".join(lines)
    )


def curve(points: Sequence[tuple[int, float]], resumed_at: int, label: str) -> str:
    """Returns a line chart as SVG, with a mark at the step where the run was resumed.

    Args:
      points: (step, value) pairs.
      resumed_at: the step of the mark.
      label: name and unit of the values.
    """
    steps, values = np.array(points, float).T
    width, height, left, bottom = 720, 260, 60, 40
    low, high = values.min(), values.max()
    span = (high - low) or 1.0

    def x(step: float) -> float:
        return left + (step - steps[0]) / max(1.0, steps[-1] - steps[0]) * (width - left - 20)

    def y(value: float) -> float:
        return 20 + (high - value) / span * (height - bottom - 20)

    line = " ".join(
        f"{x(step):.1f},{y(value):.1f}" for step, value in zip(steps, values, strict=True)
    )
    ticks = "".join(
        f'<text x="{left - 8}" y="{y(value) + 5:.0f}" text-anchor="end">{value:.3f}</text>'
        for value in (low, (low + high) / 2, high)
    )
    ticks += "".join(
        f'<text x="{x(step):.0f}" y="{height - 18}" text-anchor="middle">{step:.0f}</text>'
        for step in (steps[0], steps[-1])
    )
    mark = x(resumed_at)
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" '
        f'aria-label="{html.escape(label, quote=True)}" font-size="13" font-family="sans-serif">'
        f'<line x1="{mark:.1f}" x2="{mark:.1f}" y1="20" y2="{height - bottom}" stroke="#888" '
        f'stroke-dasharray="4 4"/><text x="{mark + 6:.0f}" y="32" fill="#555">stopped and resumed'
        f'</text><polyline points="{line}" fill="none" stroke="#1f5fa8" stroke-width="2"/>'
        f'<text x="{left}" y="13">{html.escape(label)}</text>'
        f'{ticks}<text x="{width / 2:.0f}" y="{height - 4}" text-anchor="middle">step</text></svg>'
    )


def metrics_table(metrics: Mapping[str, Number]) -> str:
    """Returns a table of metrics with units and definitions."""
    rows = [
        [
            LABELS[name],
            f'<span class="number">{html.escape(format_metric(name, value))}</span>',
            html.escape(MEANINGS[name]),
        ]
        for name, value in metrics.items()
    ]
    return table(["Metric", "Value", "Definition"], rows)


def page(title: str, sections: Sequence[tuple[str, str]]) -> str:
    """Returns the whole page.

    Args:
      title: the title, plain text.
      sections: (heading, HTML body) pairs. A section without a heading continues the one before.
    """
    return html_page.page(title, sections, _STYLE)


def judged_captions(
    documents: Sequence[Document], texts: Sequence[str], right: Bool[np.ndarray, "n"]
) -> str:
    """Returns a table of images with their captions and the generated ones, as HTML.

    Args:
      documents: held-out documents.
      texts: the generated caption of each.
      right: whether it names the concept.
    """
    rows = [
        [
            image_tag(document.pixels, document.text),
            html.escape(document.text),
            html.escape(text),
            "yes" if is_right else "no",
        ]
        for document, text, is_right in zip(documents, texts, right, strict=True)
    ]
    return table(["Held-out image", "Its caption", "Generated caption", "Right concept"], rows)


def write(
    folder: str | os.PathLike,
    title: str,
    sections: Sequence[tuple[str, str]],
    metrics: Mapping[str, Number],
) -> None:
    """Writes `index.html` (see `page`) and `metrics.json` atomically. Creates the folder."""
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("index.html", page(title, sections)),
        ("metrics.json", json.dumps(metrics, indent=1) + "\n"),
    ):
        storage.write(pathlib.Path(folder) / name, text)
