#!/usr/bin/env python3
"""Shows what fine-tuning changed: the same prompts before and after, beside the images.

    python -m benchmarks.fine_tuning --after=runs/ten/model --documents=runs/ten/documents \
        --out=docs/images/fine_tune.png

Draws one image for each caption of the documents with both models, with the same seed and each
model's own defaults, and writes one picture: a column for each document. Prints how many images
look most like the image of their own caption (LPIPS, VGG16), of all images of the documents.
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
from leon_jax.leon import Leon
from leon_jax.tokenizers.image import fit_image
from leon_jax.train import perceptual_weights

CELL, GAP, LABELS, CAPTIONS = 96, 8, 110, 48


def drawn(leon: Leon, captions: list[str], num_docs: int) -> list[np.ndarray]:
    """Returns one image for each caption."""
    settings = ImageSettings(num_images=1, num_docs=num_docs, seed=0)
    images = dict(leon.generate_each(captions, settings))
    return [np.asarray(images[number][0].image) for number in range(len(captions))]


def reconstructed(leon: Leon, images: list[np.ndarray]) -> list[np.ndarray]:
    """Returns the images after the image tokenizer."""
    encoded = [leon.tokenize(Document((Image(pixels=image),))) for image in images]
    codes = [Document((Image(codes=document.codes),)) for document in encoded]
    return [document.pixels for document in leon.model.decode_images(codes)]


def sheet(rows: dict[str, list[np.ndarray]], captions: list[str]) -> PIL.Image.Image:
    """Returns a picture with a row for each entry and a column for each caption."""
    columns = len(captions)
    size = (LABELS + columns * (CELL + GAP), len(rows) * (CELL + GAP) + CAPTIONS)
    result = PIL.Image.new("RGB", size, "white")
    draw = PIL.ImageDraw.Draw(result)
    font = PIL.ImageFont.load_default(12)
    for number, (label, images) in enumerate(rows.items()):
        top = number * (CELL + GAP)
        draw.multiline_text((4, top + 32), "\n".join(textwrap.wrap(label, 16)), "black", font)
        for column, image in enumerate(images):
            cell = PIL.Image.fromarray(image).resize((CELL, CELL), PIL.Image.Resampling.BICUBIC)
            result.paste(cell, (LABELS + column * (CELL + GAP), top))
    for column, caption in enumerate(captions):
        lines = textwrap.wrap(caption, 15)[:3]
        place = (LABELS + column * (CELL + GAP), len(rows) * (CELL + GAP))
        draw.multiline_text(place, "\n".join(lines), "black", font)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", default=None, help="a model folder; the shipped model if unset")
    parser.add_argument("--after", required=True, help="the model folder of the fine-tuned model")
    parser.add_argument("--documents", required=True, help="the documents folder of the images")
    parser.add_argument("--out", required=True, help="the picture to write")
    arguments = parser.parse_args()
    records = DocumentFolder(arguments.documents).records(TRAIN)
    documents = [records[row] for row in range(len(records))]
    captions = [document.text for document in documents]
    before, after = Leon.load(arguments.before), Leon.load(arguments.after)
    side = after.model.image_tokenizer.resolution
    images = [fit_image(document.pixels, side) for document in documents]
    rows = {
        "your image": images,
        "through the image tokenizer": reconstructed(after, images),
        "before": drawn(before, captions, 0),
        "after": drawn(after, captions, 0),
        "after, with 1 retrieved document": drawn(after, captions, 1),
    }
    out = pathlib.Path(arguments.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet(rows, captions).save(out)
    weights = perceptual_weights.load("vgg16")
    shares = {
        label: match_share(pictures, images, weights)
        for label, pictures in rows.items()
        if label != "your image"
    }
    print(json.dumps(shares, indent=1))


if __name__ == "__main__":
    main()
