#!/usr/bin/env python3
"""Draws rows of images for the pages: real, after the image tokenizer, retrieved and generated.

    python -m benchmarks.image_rows --model=runs/clip/model --out=docs/images/own_model.jpg
    python -m benchmarks.image_rows --model=runs/ten/model --documents=runs/ten/documents \
        --before=leon_jax/weights/emoji --out=docs/images/fine_tune.jpg

A column is one of the first documents of the held-out split, or of the documents folder that
--documents names. All models use the same prompts, the same seed and their own defaults. Prints the
share of images that are nearest to the image of their own caption, of all columns (LPIPS, VGG16).
"""

import argparse
import json
import pathlib
import textwrap

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from leon_jax.data.document_folder import TRAIN, DocumentFolder
from leon_jax.documents import Document, Image
from leon_jax.evaluate.perceptual_match import match_share
from leon_jax.generate.image_settings import ImageSettings
from leon_jax.generate.results import GeneratedImage
from leon_jax.leon import Leon
from leon_jax.retrieval.prepared_folder import PreparedFolder
from leon_jax.tokenizers.image import fit_image
from leon_jax.train import perceptual_weights

CELL, GAP, LABELS, CAPTIONS = 96, 8, 110, 48
REAL = "real image"


def columns(leon: Leon, folder: str | None, count: int) -> list[Document]:
    """Returns the first documents of a documents folder, or of the model's held-out split."""
    if folder is not None:
        records = DocumentFolder(folder).records(TRAIN)
    else:
        prepared = PreparedFolder(leon.retriever.folder)
        records = prepared.records(
            next(name for name in prepared.manifest["splits"] if name != TRAIN)
        )
    return [records[row] for row in range(min(count, len(records)))]


def generated(leon: Leon, captions: list[str], num_docs: int) -> list[GeneratedImage]:
    """Returns one image for each caption."""
    settings = ImageSettings(num_images=1, num_docs=num_docs, seed=0)
    images = dict(leon.generate_each(captions, settings))
    return [images[number][0] for number in range(len(captions))]


def reconstructed(leon: Leon, images: list[np.ndarray]) -> list[np.ndarray]:
    """Returns the images after the image tokenizer."""
    encoded = [leon.tokenize(Document((Image(pixels=image),))) for image in images]
    codes = [Document((Image(codes=document.codes),)) for document in encoded]
    return [document.pixels for document in leon.model.decode_images(codes)]


def rows(leon: Leon, before: Leon | None, documents: list[Document]) -> dict[str, list[np.ndarray]]:
    """Returns the rows of the picture by their labels, uint8[h, w, 3] each."""
    side = leon.model.image_tokenizer.resolution
    captions = [document.text for document in documents]
    images = [fit_image(document.pixels, side) for document in documents]
    result = {REAL: images, "after the image tokenizer": reconstructed(leon, images)}
    if before is not None:
        result["generated, before"] = [
            np.asarray(image.image) for image in generated(before, captions, 0)
        ]
    result["generated, no documents"] = [
        np.asarray(image.image) for image in generated(leon, captions, 0)
    ]
    num_docs = min(2, leon.model.folder.max_docs)
    with_documents = generated(leon, captions, num_docs)
    result["first retrieved document"] = [
        fit_image(image.retrieved[-1].pixels, side) for image in with_documents
    ]
    label = f"generated, {num_docs} document{'s' if num_docs > 1 else ''}"
    result[label] = [np.asarray(image.image) for image in with_documents]
    return result


def sheet(images: dict[str, list[np.ndarray]], captions: list[str]) -> PIL.Image.Image:
    """Returns a picture with a row for each label and a column for each caption."""
    size = (LABELS + len(captions) * (CELL + GAP), len(images) * (CELL + GAP) + CAPTIONS)
    result = PIL.Image.new("RGB", size, "white")
    draw = PIL.ImageDraw.Draw(result)
    font = PIL.ImageFont.load_default(12)
    for number, (label, row) in enumerate(images.items()):
        top = number * (CELL + GAP)
        draw.multiline_text((4, top + 32), "\n".join(textwrap.wrap(label, 16)), "black", font)
        for column, image in enumerate(row):
            cell = PIL.Image.fromarray(image).resize((CELL, CELL), PIL.Image.Resampling.BICUBIC)
            result.paste(cell, (LABELS + column * (CELL + GAP), top))
    for column, caption in enumerate(captions):
        place = (LABELS + column * (CELL + GAP), len(images) * (CELL + GAP))
        draw.multiline_text(place, "\n".join(textwrap.wrap(caption, 15)[:3]), "black", font)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="the model folder")
    parser.add_argument("--before", help="a model folder to compare with")
    parser.add_argument("--documents", help="a documents folder, instead of the held-out split")
    parser.add_argument("--columns", type=int, default=10, help="documents to show")
    parser.add_argument("--out", required=True, help="the picture to write")
    arguments = parser.parse_args()
    leon = Leon.load(arguments.model)
    before = Leon.load(arguments.before) if arguments.before else None
    documents = columns(leon, arguments.documents, arguments.columns)
    images = rows(leon, before, documents)
    out = pathlib.Path(arguments.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet(images, [document.text for document in documents]).save(out, quality=90)
    weights = perceptual_weights.load("vgg16")
    shares = {
        label: match_share(row, images[REAL], weights)
        for label, row in images.items()
        if label != REAL
    }
    print(json.dumps(shares, indent=1))


if __name__ == "__main__":
    main()
