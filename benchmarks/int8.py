"""Writes docs/int8.md: what weights and caches in 8 bits cost the demonstration's model.

    python -m benchmarks.int8

Takes about five minutes on two cores.
"""

import argparse
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from benchmarks.turns import ROOT
from leon_jax.datasets import demo
from leon_jax.documents import Document, Hole, Text
from leon_jax.engine.engine import Engine, Sample
from leon_jax.engine.guidance import ClassifierFree
from leon_jax.engine.kv_cache import CacheDtype, KVCache, valid_slots
from leon_jax.engine.sampling_params import SamplingParams
from leon_jax.generate.completion import complete
from leon_jax.generate.prompt_builder import Request
from leon_jax.leon import Leon
from leon_jax.models.decoder import Decoder
from leon_jax.models.inference_weights import convert_weights
from leon_jax.tokenizers.image import to_pixels

PROMPTS = (
    "cat face, Twemoji style", "red heart, OpenMoji style", "snowman, Twemoji style",
    "rose, OpenMoji style", "sunflower, Twemoji style", "pizza, OpenMoji style",
)  # fmt: skip
SEED = 1
ROWS = 20


@functools.partial(jax.jit, static_argnames="kept")
def likelihood(decoder: Decoder, ids, positions, weights, kept: CacheDtype):
    """Sum over t >= 1 of weights[:, t] log p(ids[:, t] | before), read token by token.

    Args:
      ids, positions, weights: [rows, length].
      kept: what the cache keeps all tokens but the first in.
    """
    rows, length = ids.shape
    hidden, keys, values = decoder.prefill(ids[:, :1], positions[:, :1])
    cache = KVCache.empty(decoder.config, rows, 1, 1, length - 1, kept, len(decoder.stacks))
    cache = cache.insert(jnp.arange(rows), keys, values, jnp.ones(rows, jnp.int32))
    head = decoder.head()

    def step(carry, at):
        cache, hidden = carry
        scores = jax.nn.log_softmax(jax.reshard(decoder.logits(hidden, head), jax.P(None, None)))
        told = jax.nn.one_hot(ids[:, at], scores.shape[1])
        gained = weights[:, at] * (scores * told).sum(axis=1)
        seen = valid_slots(length - 1, at - 1, jnp.full((rows, 1), at - 1))
        hidden, keys, values = decoder.decode_step(
            ids[:, at][None, :, None], positions[:, at][None, :, None],
            [cache.prompt()], [cache.output(seen)],
        )  # fmt: skip
        cache = cache.append(at - 1, [key[:, 0] for key in keys], [each[:, 0] for each in values])
        return (cache, hidden[0, :, 0]), gained

    _, gained = jax.lax.scan(step, (cache, hidden[:, 0]), jnp.arange(1, length))
    return gained.sum(axis=0)


def perplexity(leon: Leon, decoder: Decoder, kept: CacheDtype, documents: list[Document]) -> dict:
    """Of the tokens of pictures given their captions, and of captions given their pictures."""
    tokenizer, found = leon.model.tokenizer, {}
    engine = Engine(decoder, tokenizer.vocabulary)
    for name, part in (("picture", 1), ("caption", 0)):
        total = count = 0.0
        for start in range(0, len(documents), ROWS):
            ids, lengths = [], []
            for document in documents[start : start + ROWS]:
                hole = Hole("text" if part == 0 else "image")
                prompt = tokenizer.prompt(document.replace(part, hole))
                answer = tokenizer.completion(document.replace(part, hole), [document.parts[part]])
                ids.append(np.concatenate([prompt, answer]))
                lengths.append(len(prompt))
            padded = engine.pad(ids)
            place, rows = np.arange(padded.ids.shape[1]), zip(ids, lengths, strict=True)
            weights = np.stack([(place >= n) & (place < len(row)) for row, n in rows])
            scores = likelihood(
                decoder, padded.ids, padded.positions, weights.astype(np.float32), kept
            )
            total, count = total + float(scores.sum()), count + weights.sum()
        found[name] = float(np.exp(-total / count))
    return found


def drawn(leon: Leon, engine: Engine) -> np.ndarray:
    """The prompts' pictures side by side, uint8[height, width, 3]."""
    samples = (Sample(SEED, SamplingParams(ClassifierFree(3.0))),)
    requests = [
        Request(Document((Text(prompt), Hole("image"))), samples=samples) for prompt in PROMPTS
    ]
    codes = [None] * len(requests)
    for done in complete(engine, leon.model.tokenizer, requests):
        codes[done.index] = done.documents[0].parts[1].codes
    codes = np.stack(codes)
    return np.concatenate(list(to_pixels(leon.model.image_tokenizer.decode(codes))), axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data_dir", default="data/emoji", help="the emoji drawings")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "docs" / "int8.md")
    arguments = parser.parse_args()
    leon = Leon.load()
    vocabulary, size = leon.model.tokenizer.vocabulary, leon.model.tokenizer.text.size
    rows, pictures = [], []
    with jax.set_mesh(leon.model.mesh):
        source = demo.source("unseen_design", arguments.data_dir)
        documents = [leon.tokenize(document) for document in source]
        for name, weights, kept in (
            ("float32", "float32", "compute"),
            ("bfloat16 weights", "bfloat16", "compute"),
            ("int8 weights", "int8", "compute"),
            ("int8 weights and cache", "int8", "int8"),
        ):
            decoder = convert_weights(leon.model.engine.decoder, weights)
            found = perplexity(leon, decoder, kept, documents)
            pictures.append(
                drawn(leon, Engine(decoder, vocabulary, text_size=size, cache_dtype=kept))
            )
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

What [`convert_weights`](../leon_jax/models/inference_weights.py) and an int8 cache cost the
demonstration's model. Written by `python -m benchmarks.int8`.

Perplexity of the {len(documents)} held-out drawings of `unseen_design`: of a picture's tokens given
its caption, and of a caption's given its picture, without retrieved documents, all read token by
token through the cache.

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
