"""A small engine with random weights, what it is asked, and what a full forward pass says."""

import jax
import jax.numpy as jnp
import numpy as np

from leon_jax.engine.engine import Engine, Sample, TokenRequest
from leon_jax.engine.grammar import Forced, ImageSpan, TextSpan
from leon_jax.engine.guidance import ClassifierFree
from leon_jax.engine.sampling_params import SamplingParams
from leon_jax.engine.scheduler import generate
from leon_jax.vocabulary import Vocabulary
from tests.tiny import random_decoder

VOCABULARY = Vocabulary.compact(image_codes=24, text_tokens=40, sentinels=4, multiple=8)
TEXT, BREAK, EOS = VOCABULARY.text_start, VOCABULARY.break_id, VOCABULARY.eos
UNCONDITIONAL = np.array([EOS, VOCABULARY.sentinel(0), BREAK])
GUIDED = SamplingParams(ClassifierFree(2.0))
IMAGE = (ImageSpan(9),)
# Text, then an image, then text: the marks between them are forced.
STORY = (
    TextSpan(4, (EOS, BREAK), BREAK, final=EOS),
    ImageSpan(6),
    Forced((BREAK,)),
    TextSpan.causal(VOCABULARY, 5),
)
# Two infills; the streams count their sentinels differently.
INFILLS = (
    TextSpan.infill(VOCABULARY, 5),
    Forced((VOCABULARY.sentinel(1), VOCABULARY.sentinel(2))),
    ImageSpan(6),
    Forced((VOCABULARY.eoss,)),
    Forced((VOCABULARY.sentinel(2), VOCABULARY.sentinel(3))),
    TextSpan.infill(VOCABULARY, 3),
)
GRAMMARS = [IMAGE, (TextSpan.infill(VOCABULARY, 9),), (TextSpan.causal(VOCABULARY, 9),), STORY,
           INFILLS]  # fmt: skip


def make(part_step: int = 1, slots: int = 16, **options) -> Engine:
    """A small engine; `options` are other fields of `DecoderConfig`."""
    decoder = random_decoder(VOCABULARY.size, max_length=64, part_step=part_step, **options)
    return Engine(decoder, VOCABULARY, buckets=(8, 16), slots=slots)


def prompt(length: int, grammar=IMAGE, params=GUIDED, seeds=(0,), streams: int = 3) -> TokenRequest:
    rng = np.random.default_rng(length)
    ids = TEXT + rng.integers(0, 40, length)
    ids[[length // 2, -1]] = BREAK
    pictures = np.concatenate([ids[:2], UNCONDITIONAL])
    return TokenRequest(
        (ids, pictures, UNCONDITIONAL)[:streams],
        grammar,
        tuple(Sample(seed, params) for seed in seeds),
    )


LENGTHS = (3, 12, 7, 8)


def all_ids(outputs) -> np.ndarray:
    return np.concatenate([output.ids for output in outputs])


def oracle(engine: Engine, ids: np.ndarray) -> np.ndarray:
    """Logits of every position by one full forward pass, float32[n, vocab]."""
    padded = np.pad(ids, (0, engine.context - len(ids)))
    positions = VOCABULARY.positions(padded, engine.decoder.config.part_step)
    positions = jnp.asarray(positions.clip(max=engine.context - 1))[None]
    cells = jnp.asarray(VOCABULARY.cells(padded))[None]
    logits = np.asarray(forward(engine.decoder, jnp.asarray(padded)[None], positions, cells))
    first, stop = engine.decoder.config.head_ids
    missing = (first, VOCABULARY.size - stop)
    return np.pad(logits[0, : len(ids)], ((0, 0), missing), constant_values=-np.inf)


@jax.jit
def forward(decoder, ids, positions, cells):
    return decoder.logits(decoder(ids, positions, cells=cells))


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def replay(grammar, outputs, stream: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a stream was given; which of its ids were sampled; and which could have been.

    Returns:
      int[n] ids, bool[n], bool[n, vocab].
    """
    ids, drawn, allowed = [], [], []
    for place, (span, part) in enumerate(zip(grammar, outputs, strict=False)):
        if isinstance(span, Forced):
            ids.append((*span.ids, span.ids[-1], span.ids[-1])[stream])
            drawn.append(False)
            allowed.append(np.zeros(VOCABULARY.size, bool))
            continue
        for used, token in enumerate(part.ids):
            mask = np.zeros(VOCABULARY.size, bool)
            if isinstance(span, ImageSpan):
                mask[VOCABULARY.image_start : VOCABULARY.image_stop] = True
            else:
                mask[TEXT:] = True
                mask[list(span.stops)] = used >= span.min_tokens
            ids.append(token)
            drawn.append(True)
            allowed.append(mask)
        if isinstance(span, TextSpan) and place < len(outputs) - 1:
            ids.append(span.close)
            drawn.append(False)
            allowed.append(np.zeros(VOCABULARY.size, bool))
    return np.array(ids), np.array(drawn), np.array(allowed)


def assert_full_pass_agrees(
    engine: Engine, requests: list[TokenRequest], grammar, atol: float = 1e-4
) -> None:
    """Compares the log-probabilities of what the engine generates with a full forward pass."""
    for request, samples in zip(requests, generate(engine, requests), strict=True):
        for parts in samples:
            ids, drawn, allowed = replay(grammar, parts, 0)
            start = len(request.streams[0])
            logits = oracle(engine, np.concatenate([request.streams[0], ids]))[start - 1 : -1]
            logits = np.where(allowed | ~drawn[:, None], logits, -np.inf)
            expected = np.take_along_axis(log_softmax(logits), ids[:, None], axis=1)[drawn, 0]
            spans = zip(grammar, parts, strict=False)
            scores = [p.log_probabilities for span, p in spans if not isinstance(span, Forced)]
            np.testing.assert_allclose(np.concatenate(scores), expected, atol=atol)
