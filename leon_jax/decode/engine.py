"""The engine: prompts in, ids out, in one compiled program.

A prompt is one or more streams (all that is said, the same without texts, ...). The samples of a
prompt share it. All rows run side by side in slots: a loop on the device reads the logits of every
row, merges its streams (guidance), draws one id within its grammar, and gives that id to all its
streams. A row that is done frees its slot, which the next prompt of the queue takes; no row waits
for another.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from leon_jax import sharding
from leon_jax.config import UserError
from leon_jax.decode.cache import CacheType
from leon_jax.decode.grammar import (
    Forced,
    Part,
    Script,
    TextSpan,
    longest,
    read,
    rows_of,
)
from leon_jax.decode.loop import Heads, Padded, Work, advance, begin, empty, put, sizes, whole_rows
from leon_jax.decode.strategy import Strategies, Strategy, distinct
from leon_jax.models.decoder import Decoder
from leon_jax.ops.cross_entropy import chunked_cross_entropy
from leon_jax.vocabulary import Vocabulary

# Rows that are decoded side by side, unless the engine is told otherwise.
ROWS = 16


@dataclasses.dataclass(frozen=True)
class Sample:
    """One answer to a prompt: how its ids are drawn, and the seed of the draws."""

    seed: int = 0
    strategy: Strategy = dataclasses.field(default_factory=Strategy)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What is answered, once or several times.

    Attributes:
      streams: int32[n] each, of any lengths; stream 0 says all.
      script: what is to be written.
      samples: one for each answer; strategies may differ and read no more streams than there are.
    """

    streams: tuple[np.ndarray, ...]
    script: Script
    samples: tuple[Sample, ...] = (Sample(),)


class Answer(NamedTuple):
    """What one sample wrote.

    Attributes:
      prompt, sample: which one it is, by their places.
      parts: one a span of the script that was reached.
      done: whether this is all.
    """

    prompt: int
    sample: int
    parts: list[Part]
    done: bool


class Engine:
    """Answers prompts and scores sequences with one decoder.

    Prompts are padded to one of a few lengths, so that prompts of many lengths share a compiled
    program. A mesh must be set (`jax.set_mesh`).
    """

    def __init__(
        self,
        decoder: Decoder,
        vocabulary: Vocabulary,
        buckets: Sequence[int] | None = None,
        rows: int = ROWS,
        text_tokens: int | None = None,
        kept: CacheType = "compute",
    ):
        """Args:
        decoder: the model.
        vocabulary: its id layout.
        buckets: padded prompt lengths; by default 64, 128, 256, ... up to the model's context.
        rows: how many answers are decoded side by side.
        text_tokens: how many entries the text tokenizer has; ids of the text range beyond them mean
          nothing and are never drawn. None: as many as the range holds.
        kept: what the cache keeps keys and values in; "int8" takes half of bfloat16's memory.
        """
        self.decoder, self.vocabulary = decoder, vocabulary
        self.context = context = decoder.config.max_length
        self.rows = rows
        self.text_tokens, self.kept = text_tokens, kept
        self._part_step = decoder.config.part_step
        if buckets is None:
            buckets = [64 << i for i in range(32) if 64 << i < context]
        self.buckets = sorted({*(bucket for bucket in buckets if bucket < context), context})

    @functools.cached_property
    def heads(self) -> Heads:
        """What scores ids; made where a mesh is set, and once."""
        return Heads.of(self.decoder, self.vocabulary)

    def answer(self, prompts: Sequence[Prompt]) -> list[list[list[Part]]]:
        """Answers every prompt.

        Returns:
          For each prompt, for each of its samples, the parts of its script. A sample's answer
          depends on its prompt, strategy and seed only, not on what else is answered.

        Raises:
          UserError: a prompt and its answer are longer than the context.
          ValueError: a prompt is empty, or has fewer streams than its strategy reads.
        """
        answers: list[list] = [[None] * len(prompt.samples) for prompt in prompts]
        for answer in self.run(prompts):
            answers[answer.prompt][answer.sample] = answer.parts
        return answers

    def run(self, prompts: Sequence[Prompt], every: int | None = None) -> Iterator[Answer]:
        """Answers every prompt; answers come as they are done.

        Args:
          prompts: in the order in which they are begun.
          every: what there is of each answer comes as well whenever so many more ids are written.

        Raises:
          UserError, ValueError: see `answer`; before anything is answered.
        """
        for number, prompt in enumerate(prompts):
            self.check(prompt, number)
        if prompts:
            yield from _Run(self, prompts).answers(every)

    def warm(self, prompts: Sequence[Prompt]) -> int:
        """Compiles what prompts like these need, however long stream 0 is.

        With JAX's persistent compilation cache other processes need not compile it either.

        Returns:
          For how many lengths.
        """
        shortest = max(self._end(0, prompt.script) for prompt in prompts)
        lengths = sorted({min(bucket, self.context - shortest) for bucket in self.buckets})
        for length in lengths:
            # Texts take as many positions as they have ids.
            long = np.full(length, self.vocabulary.text_start, np.int32)
            _Run(
                self,
                [dataclasses.replace(p, streams=(long, *p.streams[1:])) for p in prompts],
            ).warm()
        return len(lengths)

    def check(self, prompt: Prompt, number: int = 0) -> None:
        """Checks that a prompt can be answered.

        Raises:
          UserError, ValueError: see `answer`.
        """
        if not all(len(stream) for stream in prompt.streams):
            raise ValueError(f"prompt {number} is empty; it must hold at least one id")
        need = max(sample.strategy.guidance.streams for sample in prompt.samples)
        if need > len(prompt.streams):
            raise ValueError(
                f"prompt {number} has {len(prompt.streams)} streams; guidance needs {need}"
            )
        before = max(map(self._extent, prompt.streams))
        after = self._end(before, prompt.script) - before
        if before + after > self.context:
            raise UserError(
                f"the prompt of {before} positions and an answer of up to {after} need "
                f"{before + after}; the model's context is {self.context}"
            )

    def score(
        self, sequences: Sequence[np.ndarray], weights: Sequence[np.ndarray] | None = None
    ) -> np.ndarray:
        """Weighted log-likelihood of each sequence, in nats.

        Args:
          sequences: int[n] ids each.
          weights: float[n] each; entry t multiplies log p(ids[t] | ids[:t]). Entry 0 is not used,
            for nothing predicts the first id. By default 1 everywhere.

        Returns:
          float32[rows].

        Raises:
          UserError: a sequence is longer than the context.
        """
        if not len(sequences):
            return np.zeros(0, np.float32)
        if (longest := max(map(self._extent, sequences))) > self.context:
            raise UserError(
                f"a sequence of {longest} positions is longer than the model's context, "
                f"{self.context}"
            )
        rows = whole_rows(len(sequences))
        padded = [*sequences, *[sequences[-1]] * (rows - len(sequences))]
        ids, positions, _, _ = self.pad(padded)
        # The hidden state at t predicts id t + 1.
        targets = np.zeros(ids.shape, np.int32)
        table = np.zeros(ids.shape, np.float32)
        for row, sequence in enumerate(sequences):
            targets[row, : len(sequence) - 1] = sequence[1:]
            table[row, : len(sequence) - 1] = 1 if weights is None else weights[row][1:]
        targets, table = (jax.device_put(array, ids.sharding) for array in (targets, table))
        scores = sharding.fetch(_score(self.decoder, ids, positions, targets, table))
        return scores[: len(sequences)]

    def bucket(self, length: int) -> int:
        """The padded length of a prompt."""
        return next(bucket for bucket in self.buckets if bucket >= length)

    def _extent(self, ids: np.ndarray) -> int:
        return self.vocabulary.extent(ids, self._part_step)

    def pad(self, sequences: Sequence[np.ndarray]) -> "Padded":
        """Sequences of ids on the devices, padded to a bucket."""
        lengths = np.array([len(sequence) for sequence in sequences], np.int32)
        ids = np.full((len(sequences), self.bucket(lengths.max())), self.vocabulary.pad, np.int32)
        positions = np.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = sequence
            positions[row, : len(sequence)] = self.vocabulary.positions(sequence, self._part_step)
        extents = np.array([self._extent(sequence) for sequence in sequences], np.int32)
        mesh = jax.sharding.get_mesh()
        wide = jax.NamedSharding(mesh, sharding.spec("batch", "length"))
        narrow = jax.NamedSharding(mesh, sharding.spec("batch"))
        return Padded(
            jax.device_put(ids, wide),
            jax.device_put(positions, wide),
            jax.device_put(lengths, narrow),
            jax.device_put(extents, narrow),
        )

    def _end(self, position: int, script: Script) -> int:
        """The position after the longest answer."""
        for span in script:
            position += longest((span, Forced((0,)))) - 1
            closed = span.close if isinstance(span, TextSpan) else None
            if isinstance(span, Forced):
                closed = span.ids[0]
            if closed == self.vocabulary.break_id and span is not script[-1]:
                position += -position % self._part_step
        last = script[-1] if script else None
        return position - isinstance(last, TextSpan)


class _Run:
    """One queue of prompts on its way: which unit is in which group of slots.

    A unit is as many samples of one prompt as share a group, which they leave together; the state
    of all groups is on the devices.
    """

    def __init__(self, engine: Engine, prompts: Sequence[Prompt]):
        self.engine, self.prompts = engine, prompts
        samples = [sample for prompt in prompts for sample in prompt.samples]
        common = math.gcd(*(len(prompt.samples) for prompt in prompts))
        self.samples = max(n for n in range(1, engine.rows + 1) if common % n == 0)
        self.units = [
            (number, first)
            for number, prompt in enumerate(prompts)
            for first in range(0, len(prompt.samples), self.samples)
        ]
        # Of a power of two, so that few programs serve all queues.
        groups = min(engine.rows // self.samples, 1 << (len(self.units) - 1).bit_length())
        self.groups = whole_rows(groups)
        self.streams = max(sample.strategy.guidance.streams for sample in samples)
        self.spans, self.ring = sizes([prompt.script for prompt in prompts])
        self.makes = distinct([sample.strategy for sample in samples])
        self.units_in: list[tuple[int, int] | None] = [None] * self.groups
        slots = tuple(
            engine.bucket(max(len(self.stream(unit, number)) for unit in self.units))
            for number in range(self.streams)
        )
        self.state = empty(
            engine.decoder.config, put(self.layout([])), slots, self.ring, engine.kept,
            len(engine.decoder.pieces),
        )  # fmt: skip

    def warm(self) -> None:
        """Compiles the programs of a run, and writes nothing."""
        self._admit(list(enumerate(self.units[: self.groups])))
        self._advance(0)

    def answers(self, every: int | None) -> Iterator[Answer]:
        """Answers as they are done; with `every`, also what there is after so many more ids."""
        engine, waiting = self.engine, list(reversed(self.units))
        while waiting or any(self.units_in):
            free = [group for group, unit in enumerate(self.units_in) if unit is None]
            if waiting and free:
                self._admit([(group, waiting.pop()) for group in free[: len(waiting)]])
            self._advance(every or self.ring)
            done, counts, tokens, scores = sharding.fetch(
                (self.state.rows.done, self.state.counts, self.state.tokens, self.state.scores)
            )
            for group, unit in enumerate(self.units_in):
                if unit is None or not (done[group].all() or every):
                    continue
                number, first = unit
                for sample in range(self.samples):
                    count = counts[group, sample]
                    yield Answer(
                        number,
                        first + sample,
                        read(
                            self.prompts[number].script,
                            tokens[group, sample, :count],
                            scores[group, sample, :count],
                            engine.vocabulary,
                        ),
                        bool(done[group].all()),
                    )
                if done[group].all():
                    self.units_in[group] = None

    def _advance(self, steps: int) -> None:
        """Writes until some group is done, or so many steps are made."""
        engine = self.engine
        busy = np.array([unit is not None for unit in self.units_in])
        self.state = advance(
            engine.decoder, engine.heads, self.state, put(busy), put(np.int32(steps)),
            vocabulary=engine.vocabulary, text_tokens=engine.text_tokens,
        )  # fmt: skip

    def stream(self, unit: tuple[int, int], number: int) -> np.ndarray:
        """The ids of a stream; a single one where a prompt has fewer streams: nobody reads it."""
        streams = self.prompts[unit[0]].streams
        return streams[number] if number < len(streams) else streams[0][:1]

    def layout(self, units: Sequence[tuple[int, tuple[int, int]]]) -> "Work":
        """What every row is to do, if only these groups have something to do."""
        scripts: list[list[Script]] = [[()] * self.samples for _ in range(self.groups)]
        strategies = [[self.makes[0]] * self.samples for _ in range(self.groups)]
        seeds = np.zeros((self.groups, self.samples), np.uint32)
        for group, (number, first) in units:
            prompt = self.prompts[number]
            chosen = prompt.samples[first : first + self.samples]
            scripts[group] = [prompt.script] * self.samples
            strategies[group] = [sample.strategy for sample in chosen]
            seeds[group] = [sample.seed % 2**32 for sample in chosen]
        return Work(
            rows_of(scripts, self.streams, self.spans),
            Strategies.of(strategies, self.makes),
            seeds,  # type: ignore[arg-type]  # all of it goes to the devices at once
        )

    def _admit(self, units: Sequence[tuple[int, tuple[int, int]]]) -> None:
        """Puts units into groups that are free."""
        source = np.full(self.groups, -1, np.int32)
        for place, (group, unit) in enumerate(units):
            source[group], self.units_in[group] = place, unit
        count = min(whole_rows(1 << (len(units) - 1).bit_length()), self.groups)
        padded = [unit for _, unit in units]
        padded += [padded[-1]] * (count - len(padded))
        prompts = [
            self.engine.pad([self.stream(unit, number) for unit in padded])
            for number in range(self.streams)
        ]
        self.state = begin(
            self.engine.decoder, self.state, put(source), prompts, put(self.layout(units))
        )


@jax.jit
def _score(
    decoder: Decoder,
    ids: Int[Array, "batch length"],
    positions: Int[Array, "batch length"],
    targets: Int[Array, "batch length"],
    weights: Float[Array, "batch length"],
) -> Float[Array, "batch"]:
    """Sum over t of weights[:, t] log p(targets[:, t] | ids[:, :t + 1])."""
    hidden = decoder(ids, positions)
    _, losses = chunked_cross_entropy(hidden, decoder.table[...], targets, weights)
    return -losses.sum(axis=1)
