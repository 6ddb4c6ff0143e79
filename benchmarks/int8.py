"""Measures what int8 weights and caches cost the shipped model, and writes docs/int8.md.

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
from leon_jax.models.weight_conversion import convert_weights
from leon_jax.tokenizers.image import to_pixels

PROMPTS = (
    "cat face, Twemoji style", "red heart, OpenMoji style", "snowman, Twemoji style",
    "rose, OpenMoji style", "sunflower, Twemoji style", "pizza, OpenMoji style",
)  # fmt: skip
SEED = 1
ROWS = 20


@functools.partial(jax.jit, static_argnames="cache_dtype")
def likelihood(decoder: Decoder, ids, positions, weights, cache_dtype: CacheDtype):
    """Returns the sum over t >= 1 of weights[:, t] log p(ids[:, t] | ids[:, :t]) for each row.

    The ids are read token by token through the cache.

    Args:
      decoder: the model.
      ids, positions, weights: [rows, length].
      cache_dtype: dtype of the cache for all tokens but the first.
    """
    rows, length = ids.shape
    hidden, keys, values = decoder.prefill(ids[:, :1], positions[:, :1])
    cache = KVCache.empty(decoder.config, rows, 1, 1, length - 1, cache_dtype, len(decoder.stacks))
    cache = cache.insert(jnp.arange(rows), keys, values, jnp.ones(rows, jnp.int32))
    head = decoder.head()

    def step(carry, position):
        cache, hidden = carry
        scores = jax.nn.log_softmax(jax.reshard(decoder.logits(hidden, head), jax.P(None, None)))
        target = jax.nn.one_hot(ids[:, position], scores.shape[1])
        score = weights[:, position] * (scores * target).sum(axis=1)
        valid = valid_slots(length - 1, position - 1, jnp.full((rows, 1), position - 1))
        hidden, keys, values = decoder.decode_step(
            ids[:, position][None, :, None], positions[:, position][None, :, None],
            [cache.prompt()], [cache.output(valid)],
        )  # fmt: skip
        cache = cache.append(
            position - 1, [key[:, 0] for key in keys], [value[:, 0] for value in values]
        )
        return (cache, hidden[0, :, 0]), score

    _, scores = jax.lax.scan(step, (cache, hidden[:, 0]), jnp.arange(1, length))
    return scores.sum(axis=0)


def perplexity(
    leon: Leon, decoder: Decoder, cache_dtype: CacheDtype, documents: list[Document]
) -> dict:
    """Returns the perplexity of image tokens given captions, and of captions given images."""
    tokenizer, perplexities = leon.model.tokenizer, {}
    engine = Engine(decoder, tokenizer.vocabulary)
    for name, part in (("image", 1), ("caption", 0)):
        total = count = 0.0
        for start in range(0, len(documents), ROWS):
            ids, lengths = [], []
            for document in documents[start : start + ROWS]:
                hole = Hole("text" if part == 0 else "image")
                prompt = tokenizer.prompt(document.replace(part, hole))
                completion = tokenizer.completion(
                    document.replace(part, hole), [document.parts[part]]
                )
                ids.append(np.concatenate([prompt, completion]))
                lengths.append(len(prompt))
            padded = engine.pad(ids)
            index, rows = np.arange(padded.ids.shape[1]), zip(ids, lengths, strict=True)
            weights = np.stack([(index >= n) & (index < len(row)) for row, n in rows])
            scores = likelihood(
                decoder, padded.ids, padded.positions, weights.astype(np.float32), cache_dtype
            )
            total, count = total + float(scores.sum()), count + weights.sum()
        perplexities[name] = float(np.exp(-total / count))
    return perplexities


def image_row(leon: Leon, engine: Engine) -> np.ndarray:
    """Generates the prompts' images and joins them in a row, uint8[height, width, 3]."""
    samples = (Sample(SEED, SamplingParams(ClassifierFree(3.0))),)
    requests = [
        Request(Document((Text(prompt), Hole("image"))), samples=samples) for prompt in PROMPTS
    ]
    codes = [None] * len(requests)
    for completion in complete(engine, leon.model.tokenizer, requests):
        codes[completion.index] = completion.documents[0].parts[1].codes
    codes = np.stack(codes)
    return np.concatenate(list(to_pixels(leon.model.image_tokenizer.decode(codes))), axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data_dir", default="data/emoji", help="the folder of emoji images")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "docs" / "int8.md")
    arguments = parser.parse_args()
    leon = Leon.load()
    vocabulary, size = leon.model.tokenizer.vocabulary, leon.model.tokenizer.text.size
    rows, images = [], []
    with jax.set_mesh(leon.model.mesh):
        source = demo.source("unseen_design", arguments.data_dir)
        documents = [leon.tokenize(document) for document in source]
        for name, weights, cache_dtype in (
            ("float32", "float32", "compute"),
            ("bfloat16 weights", "bfloat16", "compute"),
            ("int8 weights", "int8", "compute"),
            ("int8 weights and cache", "int8", "int8"),
        ):
            decoder = convert_weights(leon.model.engine.decoder, weights)
            result = perplexity(leon, decoder, cache_dtype, documents)
            engine = Engine(decoder, vocabulary, text_size=size, cache_dtype=cache_dtype)
            images.append(image_row(leon, engine))
            baseline = rows[0][1] if rows else result
            change = [f"{100 * (result[kind] / baseline[kind] - 1):+.2f} %" for kind in result]
            rows.append((name, result, change))
    image = arguments.out.parent / "images" / "int8.png"
    grid = PIL.Image.fromarray(np.concatenate(images, axis=0))
    grid.resize((2 * grid.width, 2 * grid.height), PIL.Image.Resampling.NEAREST).save(image)
    lines = [
        f"| {name} | {result['image']:.3f} | {change[0]} | {result['caption']:.3f} | {change[1]} |"
        for name, result, change in rows
    ]
    arguments.out.write_text(f"""# Eight bits

```bash
leon generate --prompt="cat face, Twemoji style" --weights=int8 --cache=int8
python -m benchmarks.int8
```

The benchmark measures what `--weights` and `--cache` cost the shipped model. In Python these
are [`convert_weights`](../leon_jax/models/weight_conversion.py) and
`Engine(..., cache_dtype="int8")`.

The table has the perplexity of the {len(documents)} held-out images of `unseen_design`: of the
image tokens given the caption, and of the caption tokens given the image. No documents are
retrieved. All tokens are read one by one through the cache.

| stored in | image | change | caption | change |
|---|---|---|---|---|
{chr(10).join(lines)}

The images below have the same prompts and seeds, with guidance 3. The rows are in the order of the
table.

![{len(PROMPTS)} prompts, with weights and caches stored in four ways](images/{image.name})

One different id changes all ids after it. So an image may differ from the one above it and be as
good.
""")


if __name__ == "__main__":
    main()
