"""One queue of prompts on its way through an engine."""

import dataclasses
import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from leon_jax import sharding
from leon_jax.decode.grammar import ImageSpan, Part, Script, Span, read, rows_of
from leon_jax.decode.loop import Work, advance, begin, empty, put, sizes, whole_rows
from leon_jax.decode.strategy import Strategies, Strategy, distinct

if TYPE_CHECKING:
    from leon_jax.decode.engine import Engine


@dataclasses.dataclass(frozen=True)
class Sample:
    """One answer to a prompt: how its ids are drawn, and the seed of the draws, 0..2**32 - 1.

    Prompts of other ids draw other random numbers, whatever their seeds.
    """

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


class Run:
    """One queue of prompts on its way: which unit is in which group of slots.

    A unit is as many samples of one prompt as share a group, which they leave together; a group has
    room for a few more than some units fill. The state of all groups is on the devices.
    """

    def __init__(self, engine: "Engine", prompts: Sequence[Prompt]):
        self.engine, self.prompts = engine, prompts
        samples = [sample for prompt in prompts for sample in prompt.samples]
        self.samples = _group([len(prompt.samples) for prompt in prompts], engine.rows)
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
            len(engine.decoder.stacks),
        )  # fmt: skip

    def warm(self) -> None:
        """Compiles the programs of a run, and writes nothing."""
        count = 1
        while True:  # as many prompts as may be read at once
            units = self.units[: min(count, self.groups)]
            self._admit(list(enumerate(units)))
            if count >= min(self.groups, len(self.units)):
                break
            count *= 2
        self._advance(0)

    def answers(self, every: int | None) -> Iterator[Answer]:
        """Answers as they are done; with `every`, also what there is after so many more ids."""
        engine, waiting = self.engine, list(reversed(self.units))
        steps = every or self.ring
        while waiting or any(self.units_in):
            free = [group for group, unit in enumerate(self.units_in) if unit is None]
            if waiting and free:
                self._admit([(group, waiting.pop()) for group in free[: len(waiting)]])
            self._advance(steps)
            rows = self.state.rows
            done, place, used, counts, tokens, scores = sharding.fetch(
                (
                    rows.done, rows.place, rows.used, self.state.counts, self.state.tokens,
                    self.state.scores,
                )
            )  # fmt: skip
            for group, unit in enumerate(self.units_in):
                if unit is None or not (done[group].all() or every):
                    continue
                number, first = unit
                for sample in range(len(self._samples(unit))):
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
            if every:
                steps = min(
                    [
                        every - used[group, sample] % every
                        for group, unit in enumerate(self.units_in)
                        if unit is not None
                        for sample in range(len(self._samples(unit)))
                        if isinstance(self._span(unit, place[group, sample]), ImageSpan)
                    ],
                    default=every,
                )

    def _samples(self, unit: tuple[int, int]) -> Sequence[Sample]:
        number, first = unit
        return self.prompts[number].samples[first : first + self.samples]

    def _span(self, unit: tuple[int, int], place: int) -> Span | None:
        """What a row is in the middle of; None if it is done."""
        script = self.prompts[unit[0]].script
        return script[place] if place < len(script) else None

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
        seeds = np.zeros((self.groups, self.samples, 2), np.uint32)
        for group, unit in units:
            prompt, chosen = self.prompts[unit[0]], self._samples(unit)
            salt = zlib.crc32(np.asarray(prompt.streams[0], np.int32).tobytes())
            for place, sample in enumerate(chosen):
                scripts[group][place] = prompt.script
                strategies[group][place] = sample.strategy
                seeds[group, place] = salt, sample.seed
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


def _group(samples: Sequence[int], rows: int) -> int:
    """How many samples of a prompt share a group: the fewest rounds, then the fewest prompts.

    Args:
      samples: how many each prompt has.
      rows: how many there are.
    """

    def cost(size: int) -> tuple[int, int, int]:
        units = sum(-(-count // size) for count in samples)
        return -(-units // (rows // size)), units, size

    return min(range(1, min(rows, max(samples)) + 1), key=cost)
