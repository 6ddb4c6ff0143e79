#!/usr/bin/env python3
"""Asks a reader which caption each image shows, without the prompts; then grades the answers.

    python -m benchmarks.blind_reading ask --model=leon_jax/weights/emoji --out=out/reading
    python -m benchmarks.blind_reading grade --out=out/reading --answers=answers.txt

`ask` writes sheet.png, numbered images for the first held-out captions; captions.txt, numbered
captions to choose from, with as many further ones of the same split; and key.json, which the reader
must not see. An answer is a line "IMAGE CAPTION", two numbers. `grade` prints the share of right
answers; an image without an answer counts as wrong.

With --reconstructions the images are the real ones after the image tokenizer.
"""

import argparse
import json
import pathlib
import sys

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from benchmarks.image_rows import reconstructed
from leon_jax.evaluate import measurements
from leon_jax.leon import Leon
from leon_jax.retrieval.prepared_folder import PreparedFolder

COLUMNS, CELL, GAP, LABEL = 8, 128, 12, 18


def sheet(images: list[np.ndarray]) -> PIL.Image.Image:
    """Returns one picture with the numbered images."""
    rows = -(-len(images) // COLUMNS)
    width, height = CELL + GAP, CELL + GAP + LABEL
    result = PIL.Image.new("RGB", (COLUMNS * width, rows * height), "white")
    draw, font = PIL.ImageDraw.Draw(result), PIL.ImageFont.load_default(14)
    for number, image in enumerate(images):
        left, top = number % COLUMNS * width, number // COLUMNS * height
        cell = PIL.Image.fromarray(image).resize((CELL, CELL), PIL.Image.Resampling.BICUBIC)
        result.paste(cell, (left, top + LABEL))
        draw.text((left, top), str(number + 1), "black", font)
    return result


def ask(arguments: argparse.Namespace) -> None:
    """Writes the sheet, the captions and the key."""
    leon = Leon.load(arguments.model, arguments.index)
    records = PreparedFolder(leon.retriever.folder).records(arguments.split)
    count = arguments.images
    if len(records) < 2 * count:
        sys.exit(f"blind_reading: {arguments.split} has {len(records)} documents; "
                 f"--images={count} needs twice as many")  # fmt: skip
    documents = [records[row] for row in range(2 * count)]
    shown = documents[:count]
    if arguments.reconstructions:
        images = reconstructed(leon, [document.pixels for document in shown])
    else:
        generated = measurements.generate(leon, shown, arguments.num_docs, seed=arguments.seed)
        images = [np.asarray(one.image) for one in generated]
    # The order says nothing about the images.
    order = np.random.default_rng(arguments.seed).permutation(len(documents))
    captions = [documents[row].text for row in order]
    # Another document may have the same caption.
    key = [
        [number + 1 for number, caption in enumerate(captions) if caption == document.text]
        for document in shown
    ]
    out = pathlib.Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    sheet(images).save(out / "sheet.png")
    lines = [f"{number + 1} {caption}" for number, caption in enumerate(captions)]
    (out / "captions.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (out / "key.json").write_text(json.dumps(key) + "\n")
    print(f"{out / 'sheet.png'} and {out / 'captions.txt'} are for the reader")


def grade(arguments: argparse.Namespace) -> None:
    """Prints how many answers are right."""
    key = json.loads((pathlib.Path(arguments.out) / "key.json").read_text())
    answers = {}
    for line in pathlib.Path(arguments.answers).read_text().splitlines():
        if line.strip():
            image, caption = map(int, line.split())
            answers[image] = caption
    right = sum(answers.get(number) in captions for number, captions in enumerate(key, 1))
    print(f"{right} of {len(key)} right ({100 * right / len(key):.0f} %)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(required=True)
    asking = verbs.add_parser("ask")
    asking.add_argument("--model", help="the model folder; by default the shipped model")
    asking.add_argument("--index", help="the prepared folder; by default that of the model")
    asking.add_argument("--split", default="unseen_design", help="the held-out split")
    asking.add_argument("--images", type=int, default=48, help="number of images")
    asking.add_argument("--num_docs", type=int, default=2, help="retrieved documents")
    asking.add_argument("--seed", type=int, default=0, help="seed of the images and the order")
    asking.add_argument("--reconstructions", action="store_true", help="real images, reconstructed")
    asking.set_defaults(run=ask)
    grading = verbs.add_parser("grade")
    grading.add_argument("--answers", required=True, help="the file of the reader's answers")
    grading.set_defaults(run=grade)
    for verb in (asking, grading):
        verb.add_argument("--out", required=True, help="the folder of the sheet and the key")
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
