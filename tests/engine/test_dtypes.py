"""Weights and caches kept in fewer bits: what is kept, and what it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from leon_jax.datasets import demo
from leon_jax.engine.engine import Engine, Sample, TokenRequest
from leon_jax.engine.grammar import ImageSpan
from leon_jax.engine.guidance import ClassifierFree
from leon_jax.engine.likelihood import log_likelihoods
from leon_jax.engine.samplers import Greedy
from leon_jax.engine.sampling_params import SamplingParams
from leon_jax.engine.scheduler import generate
from leon_jax.leon import Leon
from leon_jax.models.weight_conversion import convert_weights
from tests.engine.small import LENGTHS, VOCABULARY, all_ids, make, prompt
from tests.tiny import random_decoder


def sizes(decoder) -> dict[str, int]:
    return {
        str(dtype): sum(
            leaf.nbytes for leaf in jax.tree.leaves(decoder.blocks) if leaf.dtype == dtype
        )
        for dtype in {leaf.dtype for leaf in jax.tree.leaves(decoder.blocks)}
    }


def test_weights_are_kept_as_asked():
    decoder = random_decoder(VOCABULARY.size, max_length=64)
    whole = sizes(decoder)["float32"]
    assert sizes(convert_weights(decoder, "bfloat16")) == {"bfloat16": whole // 2}
    small = sizes(convert_weights(decoder, "int8"))
    assert small["int8"] == whole // 4 and small["float32"] < whole // 10
    assert sizes(decoder) == {"float32": whole}, "the model itself stays as it is"


def test_a_model_in_eight_bits_is_nearly_the_same():
    decoder = random_decoder(VOCABULARY.size, max_length=64)
    ids = jnp.asarray(np.random.default_rng(0).integers(4, VOCABULARY.size, (2, 20)))
    logits = jax.jit(lambda model: model.logits(model(ids)))
    exact, small = logits(decoder), logits(convert_weights(decoder, "int8"))
    assert np.std(small - exact) < 0.02 * np.std(exact)
    assert (np.asarray(small) != np.asarray(exact)).any()


def test_decoding_with_eight_bits_agrees_with_the_same_model_uncached():
    """Weights in 8 bits change the model, not the agreement of its two ways of being run."""
    decoder = convert_weights(random_decoder(VOCABULARY.size, max_length=64), "int8")
    engine = Engine(decoder, VOCABULARY, buckets=(8, 16))
    whole = jax.jit(lambda model, ids: model.logits(model(ids)))
    asked = [
        prompt(n, (ImageSpan(9),), SamplingParams(ClassifierFree(2.0), Greedy())) for n in LENGTHS
    ]
    for one, ((part,),) in zip(asked, generate(engine, asked), strict=True):
        logits = []
        for ids in one.streams[:2]:
            found = np.asarray(whole(decoder, _row(np.concatenate([ids, part.ids]))))[0]
            logits.append(found[len(ids) - 1 :][:9])
        merged = logits[1] + 2.0 * (logits[0] - logits[1])
        merged = merged[:, VOCABULARY.image_start : VOCABULARY.image_stop]
        chosen = merged[np.arange(9), part.ids - VOCABULARY.image_start]
        np.testing.assert_allclose(chosen, merged.max(axis=1), atol=1e-3)


def _row(ids: np.ndarray) -> np.ndarray:
    """One sequence, padded so that all have one length."""
    return np.pad(ids, (0, 40 - len(ids)))[None].astype(np.int32)


def test_a_cache_in_eight_bits_nearly_agrees():
    exact = make()
    small = Engine(exact.decoder, VOCABULARY, buckets=(8, 16), cache_dtype="int8")
    asked = [prompt(n, (ImageSpan(9),), SamplingParams(), seeds=range(8)) for n in LENGTHS]
    same, total = 0, 0
    for left, right in zip(generate(exact, asked), generate(small, asked), strict=True):
        for ours, theirs in zip(left, right, strict=True):
            # Likelihoods are those of each one's own ids, so only the first can be compared.
            first = ours[0].log_probabilities[0], theirs[0].log_probabilities[0]
            assert first[0] == pytest.approx(first[1], abs=0.05)
            same += int((all_ids(ours) == all_ids(theirs)).sum())
            total += 9
    assert same > 0.8 * total
    cache = small_cache(small)
    assert cache.prompt_keys[0].values.dtype == cache.output_values[0].values.dtype == jnp.int8


def small_cache(engine: Engine):
    """The cache of a run."""
    kept = []
    from leon_jax.engine import decode_loop

    with pytest.MonkeyPatch.context() as patch:
        advance = decode_loop.decode
        patch.setattr(
            "leon_jax.engine.scheduler.decode",
            lambda *a, **o: kept.append(advance(*a, **o)) or kept[-1],
        )
        generate(engine, [TokenRequest((np.arange(4, 9),), (ImageSpan(3),), (Sample(),))])
    return kept[-1].caches[0]


def test_the_shipped_models_perplexity_in_eight_bits_is_within_one_per_cent(emoji_data_dir):
    leon = Leon.load()
    documents = [
        leon.tokenize(one) for one in list(demo.source("unseen_design", emoji_data_dir))[:24]
    ]
    tokenizer = leon.model.tokenizer
    ids = [tokenizer.encode(document) for document in documents]
    count = sum(map(len, ids)) - len(ids)

    def perplexity(decoder) -> float:
        return float(
            np.exp(-log_likelihoods(Engine(decoder, tokenizer.vocabulary), ids).sum() / count)
        )

    decoder = leon.model.engine.decoder
    exact, small = perplexity(decoder), perplexity(convert_weights(decoder, "int8"))
    assert small == pytest.approx(exact, rel=0.01)
    assert small != exact
