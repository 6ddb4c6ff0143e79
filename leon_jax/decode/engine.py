"""The engine: prompts in, ids out, in one compiled program.

A prompt is one or more streams (all that is said, the same without texts, ...). The samples of a
prompt share it. All rows run side by side in slots: a loop on the device reads the logits of every
row, merges its streams (guidance), draws one id within its grammar, and gives that id to all its
streams. A row that is done frees its slot, which the next prompt of the queue takes; no row waits
for another.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from leon_jax import sharding
from leon_jax.config import UserError
from leon_jax.decode.cache import CacheType
from leon_jax.decode.grammar import Forced, Part, Script, TextSpan, longest
from leon_jax.decode.loop import Heads, Padded, whole_rows
from leon_jax.decode.queue import Answer, Prompt, Run, Sample
from leon_jax.models.decoder import Decoder
from leon_jax.ops.cross_entropy import chunked_cross_entropy
from leon_jax.vocabulary import Vocabulary

__all__ = ["Answer", "Engine", "Prompt", "Sample"]

# Rows that are decoded side by side, unless the engine is told otherwise.
ROWS = 16


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
          every: what there is of each answer comes as well whenever so many more ids are written;
            within a picture, when a multiple of so many of its ids are.

        Raises:
          UserError, ValueError: see `answer`; before anything is answered.
        """
        for number, prompt in enumerate(prompts):
            try:
                self.check(prompt)
            except (UserError, ValueError) as error:
                raise type(error)(f"prompt {number}: {error}") from error
        if prompts:
            yield from Run(self, prompts).answers(every)

    def warm(self, prompts: Sequence[Prompt]) -> int:
        """Compiles what a queue of prompts like these needs, however long their streams 0 are.

        With JAX's persistent compilation cache other processes need not compile it either.

        Returns:
          For how many lengths.

        Raises:
          UserError, ValueError: see `answer`.
        """
        for prompt in prompts:
            self.check(prompt)
        shortest = max(self._end(0, prompt.script) for prompt in prompts)
        lengths = sorted({min(bucket, self.context - shortest) for bucket in self.buckets})
        for length in lengths:
            # Texts take as many positions as they have ids.
            long = np.full(length, self.vocabulary.text_start, np.int32)
            Run(
                self,
                [dataclasses.replace(p, streams=(long, *p.streams[1:])) for p in prompts],
            ).warm()
        return len(lengths)

    def check(self, prompt: Prompt) -> None:
        """Checks that a prompt can be answered.

        Raises:
          UserError, ValueError: see `answer`.
        """
        if not prompt.streams or not all(len(stream) for stream in prompt.streams):
            raise ValueError("a stream is empty; it must hold at least one id")
        if not prompt.script or not prompt.samples:
            raise ValueError("there is nothing to write: the script or the samples are empty")
        for span in prompt.script:
            ends = (*span.stops, span.close) if isinstance(span, TextSpan) else ()
            if self.vocabulary.is_text(np.array(ends, np.int32)).any():
                raise ValueError(f"a text cannot be ended by ids of texts, {ends}")
        for sample in prompt.samples:
            sample.strategy.check()
            if not 0 <= sample.seed < 2**32:
                raise UserError(f"seed is {sample.seed}; it must be from 0 to {2**32 - 1:,}")
        need = max(sample.strategy.guidance.streams for sample in prompt.samples)
        if need > len(prompt.streams):
            raise ValueError(f"there are {len(prompt.streams)} streams; guidance needs {need}")
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
          ValueError: a sequence is empty.
        """
        for sequence in sequences:
            self.check_sequence(sequence)
        scores = [np.zeros(0, np.float32)]
        for start in range(0, len(sequences), self.rows):
            part = slice(start, start + self.rows)
            scores.append(self._scored(sequences[part], None if weights is None else weights[part]))
        return np.concatenate(scores)

    def check_sequence(self, ids: np.ndarray) -> None:
        """Checks that `score` can score a sequence.

        Raises:
          UserError, ValueError: see `score`.
        """
        if not len(ids):
            raise ValueError("a sequence is empty; it must hold at least one id")
        if (extent := self._extent(ids)) > self.context:
            raise UserError(
                f"a sequence of {extent} positions is longer than the model's context, "
                f"{self.context}"
            )

    def _scored(
        self, sequences: Sequence[np.ndarray], weights: Sequence[np.ndarray] | None
    ) -> np.ndarray:
        """`score` of so many sequences as are read at once."""
        # Of a power of two, so that few programs serve all.
        rows = whole_rows(1 << (len(sequences) - 1).bit_length())
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
        """Sequences of ids, none longer than the context, on the devices and padded to a bucket."""
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
        for place, span in enumerate(script):
            position += longest((span, Forced((0,)))) - 1
            closed = span.close if isinstance(span, TextSpan) else None
            if isinstance(span, Forced):
                closed = span.ids[0]
            if closed == self.vocabulary.break_id and place < len(script) - 1:
                position += -position % self._part_step
        last = script[-1] if script else None
        return position - isinstance(last, TextSpan)


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
