"""The engine: one decoder with its padded prompt lengths and its output heads.

It knows ids and nothing of documents or files. `leon_jax.engine.scheduler.Scheduler` runs requests
through it. `leon_jax.engine.likelihood` scores sequences with it.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np

from leon_jax import sharding
from leon_jax.config import UserError
from leon_jax.engine.decode_loop import Heads, PaddedPrompts
from leon_jax.engine.grammar import Forced, Grammar, TextSpan, max_new_tokens
from leon_jax.engine.kv_cache import CacheDtype
from leon_jax.engine.sampling_params import SamplingParams
from leon_jax.models.decoder import Decoder
from leon_jax.vocabulary import Vocabulary

# Samples that are decoded side by side unless the engine is told otherwise.
SLOTS = 16


@dataclasses.dataclass(frozen=True)
class Sample:
    """One output of a request: its random seed, 0..2**32 - 1, and its sampling parameters.

    Requests whose prompts differ get different random numbers for equal seeds.
    """

    seed: int = 0
    params: SamplingParams = dataclasses.field(default_factory=SamplingParams)


@dataclasses.dataclass(frozen=True)
class TokenRequest:
    """A prompt as ids, and its samples.

    Attributes:
      streams: int32[n] each, of any lengths. Stream 0 is the conditional one.
      grammar: what is generated.
      samples: one for each output. Their parameters may differ, and need no more streams than
        there are.
    """

    streams: tuple[np.ndarray, ...]
    grammar: Grammar
    samples: tuple[Sample, ...] = (Sample(),)


class Engine:
    """One decoder, ready to run requests and to score sequences.

    Prompts are padded to one of a few lengths, so that prompts of many lengths share a compiled
    program. Everything runs on one mesh, which callers need not set.
    """

    def __init__(
        self,
        decoder: Decoder,
        vocabulary: Vocabulary,
        buckets: Sequence[int] | None = None,
        slots: int = SLOTS,
        text_size: int | None = None,
        cache_dtype: CacheDtype = "compute",
        mesh: jax.sharding.Mesh | None = None,
    ):
        """Args:
        decoder: the model.
        vocabulary: its id layout.
        buckets: padded prompt lengths; by default 64, 128, 256, ... up to the model's context.
        slots: how many samples are decoded side by side.
        text_size: the size of the text tokenizer; larger ids of the text range mean nothing and are
          never sampled. None: all ids of the range may be sampled.
        cache_dtype: the dtype of cached keys and values; "int8" takes half of bfloat16's memory.
        mesh: the devices that the decoder is on; None: the mesh that is set.
        """
        self.mesh = mesh or sharding.current_mesh()
        self.decoder, self.vocabulary = decoder, vocabulary
        self.context = context = decoder.config.max_length
        self.slots = slots
        self.text_size, self.cache_dtype = text_size, cache_dtype
        self._part_step = decoder.config.part_step
        if buckets is None:
            buckets = [64 << i for i in range(32) if 64 << i < context]
        self.buckets = sorted({*(bucket for bucket in buckets if bucket < context), context})

    @functools.cached_property
    def heads(self) -> Heads:
        """The output heads; made once. The mesh must be set."""
        return Heads.of(self.decoder, self.vocabulary)

    def check(self, request: TokenRequest) -> None:
        """Checks that a request can be run.

        Raises:
          UserError: the prompt and its longest output exceed the context, or a sampling parameter
            or a seed is out of range.
          ValueError: a stream, the grammar or the samples are empty; a text is ended by a text id;
            or guidance needs more streams than there are.
        """
        if not request.streams or not all(len(stream) for stream in request.streams):
            raise ValueError("a stream is empty; it must hold at least one id")
        if not request.grammar or not request.samples:
            raise ValueError("there is nothing to generate: the grammar or the samples are empty")
        for span in request.grammar:
            ends = (*span.stops, span.close) if isinstance(span, TextSpan) else ()
            if self.vocabulary.is_text(np.array(ends, np.int32)).any():
                raise ValueError(f"a text cannot be ended by text ids, {ends}")
        for sample in request.samples:
            sample.params.check()
            if not 0 <= sample.seed < 2**32:
                raise UserError(f"seed is {sample.seed}; it must be from 0 to {2**32 - 1:,}")
        needed = max(sample.params.guidance.streams for sample in request.samples)
        if needed > len(request.streams):
            raise ValueError(f"there are {len(request.streams)} streams; guidance needs {needed}")
        prompt = max(map(self.extent, request.streams))
        output = self._end(prompt, request.grammar) - prompt
        if prompt + output > self.context:
            raise UserError(
                f"the prompt of {prompt} positions and an output of up to {output} need "
                f"{prompt + output}; the model's context is {self.context}"
            )

    def bucket(self, length: int) -> int:
        """The padded length of a prompt."""
        return next(bucket for bucket in self.buckets if bucket >= length)

    def pad(self, sequences: Sequence[np.ndarray]) -> PaddedPrompts:
        """Sequences of ids, none longer than the context, padded to a bucket, on the devices."""
        lengths = np.array([len(sequence) for sequence in sequences], np.int32)
        ids = np.full((len(sequences), self.bucket(lengths.max())), self.vocabulary.pad, np.int32)
        positions = np.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = sequence
            positions[row, : len(sequence)] = self.vocabulary.positions(sequence, self._part_step)
        extents = np.array([self.extent(sequence) for sequence in sequences], np.int32)
        mesh = jax.sharding.get_mesh()
        tokens = jax.NamedSharding(mesh, sharding.spec("batch", "length"))
        rows = jax.NamedSharding(mesh, sharding.spec("batch"))
        return PaddedPrompts(
            jax.device_put(ids, tokens),
            jax.device_put(positions, tokens),
            jax.device_put(lengths, rows),
            jax.device_put(extents, rows),
        )

    def longest_prompt(self, grammar: Grammar) -> int:
        """The longest prompt, in positions, that leaves room for the longest output."""
        return self.context - self._end(0, grammar)

    def extent(self, ids: np.ndarray) -> int:
        """Returns the number of positions that int[n] ids take."""
        return self.vocabulary.extent(ids, self._part_step)

    def _end(self, position: int, grammar: Grammar) -> int:
        """The position after the longest output."""
        for number, span in enumerate(grammar):
            position += max_new_tokens((span, Forced((0,)))) - 1
            closing = span.close if isinstance(span, TextSpan) else None
            if isinstance(span, Forced):
                closing = span.ids[0]
            if closing == self.vocabulary.break_id and number < len(grammar) - 1:
                position += -position % self._part_step
        last = grammar[-1] if grammar else None
        return position - isinstance(last, TextSpan)
