"""The engine: a decoder with its padded prompt lengths and its output heads.

The engine works with token ids. It does not handle documents or files.
`leon_jax.engine.scheduler.Scheduler` runs requests with it. `leon_jax.engine.likelihood` scores
sequences with it.
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

# Default number of samples that are decoded at once.
SLOTS = 16


@dataclasses.dataclass(frozen=True)
class Sample:
    """One output of a request.

    Attributes:
      seed: random seed, 0..2**32 - 1. The random numbers also depend on the ids of stream 0, so
        requests with different prompts get different random numbers for equal seeds.
      params: sampling parameters.
    """

    seed: int = 0
    params: SamplingParams = dataclasses.field(default_factory=SamplingParams)


@dataclasses.dataclass(frozen=True)
class TokenRequest:
    """A prompt as ids, the grammar of its outputs, and its samples.

    Attributes:
      streams: the prompt of each stream, int32[n] with n of 1 or more, which may differ between
        streams. Stream 0 is the conditional one.
      grammar: the spans to generate, at least one.
      samples: one or more samples, one for each output. Their parameters may differ. Their guidance
        needs at most as many streams as there are in `streams`.
    """

    streams: tuple[np.ndarray, ...]
    grammar: Grammar
    samples: tuple[Sample, ...] = (Sample(),)


class Engine:
    """A decoder with the settings that the scheduler and the scoring of sequences need.

    Prompts are padded to one of a few lengths (buckets), so that prompts of many lengths share a
    compiled program. All programs run on one mesh. `Scheduler` and `log_likelihoods` set it, so
    their callers do not have to.
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
        """Creates an engine.

        Args:
          decoder: the decoder.
          vocabulary: the decoder's id layout.
          buckets: padded prompt lengths in ids. The model's context is always one of them; larger
            ones are ignored. None: 64, 128, 256, ... below the context, and the context.
          slots: number of samples that are decoded at once.
          text_size: size of the text tokenizer. Larger ids of the text range have no meaning and
            are never sampled. None: all ids of the text range may be sampled.
          cache_dtype: dtype of cached keys and values: the compute dtype of the decoder, or "int8",
            which needs about half the memory of bfloat16.
          mesh: the mesh with the decoder's devices. None: the current mesh or, if none is set, a
            mesh over all devices.
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
        """The output heads, computed at the first use. The mesh must be set."""
        return Heads.of(self.decoder, self.vocabulary)

    def check(self, request: TokenRequest) -> None:
        """Checks that a request can be run.

        Raises:
          UserError: the prompt and its longest output exceed the context, or `SamplingParams.check`
            or the range of seeds refuses a sample.
          ValueError: there are no streams; a stream, the grammar or the samples are empty; a stop
            or the closing id of a text is a text id; or guidance needs more streams than there are.
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
        """Returns the padded length of a prompt: the smallest bucket that holds `length` ids.

        Raises:
          StopIteration: `length` is above the context.
        """
        return next(bucket for bucket in self.buckets if bucket >= length)

    def pad(self, sequences: Sequence[np.ndarray]) -> PaddedPrompts:
        """Pads sequences to one bucket, and puts them on the devices of the current mesh.

        Args:
          sequences: int[n] ids each, with n from 1 to the context. The number of sequences is a
            multiple of the batch shards (see `round_up_rows`).

        Raises:
          StopIteration: a sequence is longer than the context.
        """
        lengths = np.array([len(sequence) for sequence in sequences], np.int32)
        ids = np.full((len(sequences), self.bucket(lengths.max())), self.vocabulary.pad, np.int32)
        positions, cells = np.zeros_like(ids), np.full_like(ids, -1)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = sequence
            positions[row, : len(sequence)] = self.vocabulary.positions(sequence, self._part_step)
            cells[row, : len(sequence)] = self.vocabulary.cells(sequence)
        extents = np.array([self.extent(sequence) for sequence in sequences], np.int32)
        mesh = jax.sharding.get_mesh()
        tokens = jax.NamedSharding(mesh, sharding.spec("batch", "length"))
        rows = jax.NamedSharding(mesh, sharding.spec("batch"))
        return PaddedPrompts(
            jax.device_put(ids, tokens),
            jax.device_put(positions, tokens),
            jax.device_put(cells, tokens),
            jax.device_put(lengths, rows),
            jax.device_put(extents, rows),
        )

    def longest_prompt(self, grammar: Grammar) -> int:
        """Returns the length, in positions, of the longest prompt that leaves room for any output.

        The output is counted from position 0. If `part_step` is above 1 and the grammar has a
        `<break>` before its last span, the gap after the `<break>` depends on the prompt's length,
        so a prompt of this length may not fit.
        """
        return self.context - self._end(0, grammar)

    def extent(self, ids: np.ndarray) -> int:
        """Returns the number of positions of int[n] ids, which is the position of the next id."""
        return self.vocabulary.extent(ids, self._part_step)

    def _end(self, position: int, grammar: Grammar) -> int:
        """Returns the position after the longest output of a grammar that starts at `position`."""
        for number, span in enumerate(grammar):
            position += max_new_tokens((span, Forced((0,)))) - 1
            closing = span.close if isinstance(span, TextSpan) else None
            if isinstance(span, Forced):
                closing = span.ids[0]
            if closing == self.vocabulary.break_id and number < len(grammar) - 1:
                position += -position % self._part_step
        last = grammar[-1] if grammar else None
        return position - isinstance(last, TextSpan)
