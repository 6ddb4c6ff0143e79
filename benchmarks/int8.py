"""Writes docs/int8.md: what weights and caches in 8 bits cost the demonstration's model.

    python -m benchmarks.int8

Takes about two minutes on two cores.
"""

import argparse
import pathlib

import jax
import numpy as np
import PIL.Image

from benchmarks.turns import ROOT
from leon_jax.data.emoji import EmojiSource
from leon_jax.decode.complete import Request, complete
from leon_jax.decode.engine import Engine
from leon_jax.decode.guidance import ClassifierFree
from leon_jax.decode.strategy import Strategy
from leon_jax.documents import Document, Hole, Text
from leon_jax.leon import Leon
from leon_jax.tokenizers.image import to_pixels

PROMPTS = (
    "cat face, Twemoji style", "red heart, OpenMoji style", "snowman, Twemoji style",
    "rose, OpenMoji style", "sunflower, Twemoji style", "pizza, OpenMoji style",
)  # fmt: skip
SEED = 1


def perplexity(leon: Leon, decoder, documents: list[Document]) -> dict[str, float]:
    """Of the tokens of pictures given their captions, and of captions given their pictures."""
    tokenizer, found = leon.checkpoint.documents, {}
    engine = Engine(decoder, tokenizer.vocabulary)
    for name, part in (("picture", 1), ("caption", 0)):
        ids, weights = [], []
        for document in documents:
            hole = Hole("text" if part == 0 else "image")
            prompt = tokenizer.prompt(document.replace(part, hole))
            answer = tokenizer.answer(document.replace(part, hole), [document.parts[part]])
            ids.append(np.concatenate([prompt, answer]))
            weights.append(np.repeat([0.0, 1.0], [len(prompt), len(answer)]))
        scores = np.concatenate(
            [engine.score(ids[i : i + 16], weights[i : i + 16]) for i in range(0, len(ids), 16)]
        )
        found[name] = float(np.exp(-scores.sum() / sum(map(np.sum, weights))))
    return found


def drawn(leon: Leon, engine: Engine) -> np.ndarray:
    """The prompts' pictures side by side, uint8[height, width, 3]."""
    strategy = Strategy(ClassifierFree(3.0))
    requests = [
        Request(Document((Text(prompt), Hole("image"))), seed=SEED, strategy=strategy)
        for prompt in PROMPTS
    ]
    done = complete(engine, leon.checkpoint.documents, requests)
    codes = np.stack([document.parts[1].codes for document in done])
    return np.concatenate(list(to_pixels(leon.image_tokenizer.decode(codes))), axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data_dir", default="data/emoji", help="the emoji drawings")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "docs" / "int8.md")
    arguments = parser.parse_args()
    leon = Leon.load()
    vocabulary, size = leon.checkpoint.documents.vocabulary, leon.checkpoint.documents.text.size
    rows, pictures = [], []
    with jax.set_mesh(leon.mesh):
        source = EmojiSource("unseen_design", arguments.data_dir)
        documents = [leon.tokenize(document) for document in source]
        for name, weights, kept in (
            ("float32", "float32", "compute"),
            ("bfloat16 weights", "bfloat16", "compute"),
            ("int8 weights", "int8", "compute"),
            ("int8 weights and cache", "int8", "int8"),
        ):
            decoder = leon.decoder.stored_as(weights)
            found = perplexity(leon, decoder, documents)
            pictures.append(drawn(leon, Engine(decoder, vocabulary, text_tokens=size, kept=kept)))
            first = rows[0][1] if rows else found
            change = [f"{100 * (found[kind] / first[kind] - 1):+.2f} %" for kind in found]
            rows.append((name, found, change))
    image = arguments.out.parent / "images" / "int8.png"
    grid = PIL.Image.fromarray(np.concatenate(pictures, axis=0))
    grid.resize((2 * grid.width, 2 * grid.height), PIL.Image.Resampling.NEAREST).save(image)
    lines = [
        f"| {name} | {found['picture']:.3f} | {change[0]} | {found['caption']:.3f} | {change[1]} |"
        for name, found, change in rows
    ]
    arguments.out.write_text(f"""# Eight bits

What [`Decoder.stored_as`](../leon_jax/models/decoder.py) and `Engine(kept="int8")` cost the
demonstration's model. Written by `python -m benchmarks.int8`.

Perplexity of the {len(documents)} held-out drawings of `unseen_design`: of a picture's tokens given
its caption, and of a caption's given its picture, without retrieved documents. Scores are taken
without a cache, so the last two lines share them.

| kept in | picture | change | caption | change |
|---|---|---|---|---|
{chr(10).join(lines)}

The same prompts and seeds, guidance 3, in the order of the table from top to bottom:

![{len(PROMPTS)} prompts, drawn with weights and caches kept in four ways](images/{image.name})

An id that is drawn differently once changes all that follow it, so a picture may part from the one
above it and still be as good.
""")


if __name__ == "__main__":
    main()
