"""The scheduler: a queue of requests, which can change while the engine decodes.

    scheduler = Scheduler(engine)
    number = scheduler.submit(request)     # at any time, even while other requests run
    for event in scheduler.step(): ...     # Admitted, Tokens, Done, Failed
    scheduler.cancel(number)

The state of all slots is on the devices. Slots are divided into groups. The samples of a group
share one prompt and its cached keys and values. A request uses one or more groups. If all samples
of a group are finished, the next request gets the group. The other groups continue.

The compiled programs have fixed sizes (`BatchSizes`). A request that needs larger sizes waits until
all slots are empty. Then a new state with sufficient sizes is created.
"""

import collections
import dataclasses
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from leon_jax import sharding
from leon_jax.config import UserError
from leon_jax.engine.compiled_shapes import BatchSizes, next_power_of_two, stream_ids
from leon_jax.engine.decode_loop import (
    DecodeState,
    RowInputs,
    decode,
    finish,
    init_state,
    prefill,
    replicate,
    round_up_rows,
)
from leon_jax.engine.engine import Engine, Sample, TokenRequest
from leon_jax.engine.grammar import Grammar, GrammarState, ImageSpan, SpanOutput, split_output
from leon_jax.engine.sampling_params import BatchedParams


class Admitted(NamedTuple):
    """The event that some samples of a request were given slots.

    Attributes:
      request: the number that `submit` returned.
      samples: the indices of the samples.
    """

    request: int
    samples: range


class Tokens(NamedTuple):
    """The outputs so far of a sample in an unfinished group.

    Attributes:
      request: the number that `submit` returned.
      sample: the index of the sample.
      outputs: one output for each span that the sample has reached (see `split_output`).
    """

    request: int
    sample: int
    outputs: list[SpanOutput]


class Done(NamedTuple):
    """The outputs of a finished sample; for the attributes see `Tokens`."""

    request: int
    sample: int
    outputs: list[SpanOutput]


class Failed(NamedTuple):
    """The event that a sample cannot be finished, because no id could be sampled.

    Attributes:
      request, sample: see `Tokens`.
      error: the error; its message says how many ids were generated before.
    """

    request: int
    sample: int
    error: UserError


Event = Admitted | Tokens | Done | Failed


class _Unit(NamedTuple):
    """Samples of one request that share a group."""

    request: int
    samples: range


class Scheduler:
    """Runs requests with an engine; see the docstring of this module.

    Args:
      engine: the engine with the decoder.
      every: interval of `Tokens` events in ids, 1 or more. `step` decodes at most this number of
        ids for each sample, and returns the `Tokens` of all samples in unfinished groups. It stops
        earlier if the number of ids in some sample's image reaches a multiple of `every`. None:
        `step` runs until some group is finished, and returns no `Tokens`.
      sizes: sizes for requests that arrive one by one. They are kept as long as requests fit. None:
        if all slots are empty, the sizes are chosen for the requests that wait.
    """

    def __init__(self, engine: Engine, every: int | None = None, sizes: BatchSizes | None = None):
        self.engine, self.every = engine, every
        self._min_sizes = sizes
        self._requests: dict[int, TokenRequest] = {}
        self._unfinished: dict[int, int] = {}  # number of unfinished samples of each request
        self._waiting: collections.deque[int] = collections.deque()
        self._started: dict[int, int] = {}  # admitted samples of each waiting request
        self._groups: list[_Unit | None] = []
        self._sizes: BatchSizes | None = None
        self._state: DecodeState | None = None
        self._next_number = 0
        self._max_steps = every

    @property
    def is_busy(self) -> bool:
        """True if a request waits or runs."""
        return bool(self._requests)

    @property
    def waiting(self) -> int:
        """Number of requests with samples that wait for slots."""
        return len(self._waiting)

    def submit(self, request: TokenRequest) -> int:
        """Adds a request to the queue.

        Returns:
          The number of the request, which identifies it in events. Numbers count from 0.

        Raises:
          UserError, ValueError: see `Engine.check`.
        """
        self.engine.check(request)
        number = self._next_number
        self._next_number += 1
        self._requests[number] = request
        self._unfinished[number], self._started[number] = len(request.samples), 0
        self._waiting.append(number)
        return number

    def cancel(self, number: int) -> None:
        """Removes a request from the queue. It has no further events, and its slots become free.

        A number that is not, or no longer, in the queue is ignored.
        """
        if self._requests.pop(number, None) is None:
            return
        del self._unfinished[number]
        if number in self._started:
            del self._started[number]
            self._waiting.remove(number)
        running = np.array([u is not None and u.request == number for u in self._groups])
        if running.any():
            assert self._state is not None
            with jax.set_mesh(self.engine.mesh):
                self._state = finish(self._state, replicate(running))
            self._groups = [
                None if is_running else unit
                for unit, is_running in zip(self._groups, running, strict=True)
            ]

    def step(self) -> list[Event]:
        """Gives free slots to waiting requests, and decodes until a group is finished.

        A group is finished if all its samples are. If `every` is given, the method may return
        earlier (see `Scheduler`).

        Returns:
          The events, `Admitted` first. The list is empty if no request waits or runs.
        """
        if not self.is_busy:
            return []
        engine = self.engine
        with jax.set_mesh(engine.mesh):
            events: list[Event] = [Admitted(*unit) for unit in self._admit()]
            assert self._state is not None and self._sizes is not None
            busy = np.array([unit is not None for unit in self._groups])
            max_steps = self._sizes.max_new_tokens if self._max_steps is None else self._max_steps
            self._state = state = decode(
                engine.decoder,
                engine.heads,
                self._state,
                replicate(busy),
                replicate(np.int32(max_steps)),
                vocabulary=engine.vocabulary,
                text_size=engine.text_size,
            )
            done, failed, span, used, counts, tokens, scores = sharding.fetch(
                (
                    state.grammar.done, state.failed, state.grammar.span, state.grammar.used,
                    state.counts, state.tokens, state.scores,
                )
            )  # fmt: skip
        steps_to_row_end = []
        for group, unit in enumerate(self._groups):
            if unit is None:
                continue
            is_done = bool(done[group].all())
            if not is_done and self.every is None:
                continue
            request = self._requests[unit.request]
            for slot, sample in enumerate(unit.samples):
                count = counts[group, slot]
                if is_done and failed[group, slot]:
                    events.append(Failed(unit.request, sample, _not_finite(count)))
                    continue
                outputs = split_output(
                    request.grammar,
                    tokens[group, slot, :count],
                    scores[group, slot, :count],
                    self.engine.vocabulary,
                )
                kind = Done if is_done else Tokens
                events.append(kind(unit.request, sample, outputs))
                if self.every and not is_done and self._is_image(request, span[group, slot]):
                    steps_to_row_end.append(self.every - used[group, slot] % self.every)
            if is_done:
                self._release(group, unit)
        self._max_steps = min(steps_to_row_end, default=self.every)
        return events

    def warm(self, requests: Sequence[TokenRequest]) -> int:
        """Compiles the programs for a queue of requests like these, for all lengths of stream 0.

        If JAX's persistent compilation cache is on, other processes do not have to compile these
        programs either.

        Args:
          requests: one or more requests. Prompts of each length replace stream 0.

        Returns:
          The number of prompt lengths for which the programs were compiled.

        Raises:
          UserError, ValueError: see `Engine.check`.
        """
        for request in requests:
            self.engine.check(request)
        longest = min(self.engine.longest_prompt(request.grammar) for request in requests)
        lengths = sorted({min(bucket, longest) for bucket in self.engine.buckets})
        for length in lengths:
            # A prompt of text ids has as many positions as ids.
            ids = np.full(length, self.engine.vocabulary.text_start, np.int32)
            trial = Scheduler(self.engine, self.every)
            for each in requests:
                trial.submit(dataclasses.replace(each, streams=(ids, *each.streams[1:])))
            trial.compile()
        return len(lengths)

    def compile(self) -> None:
        """Compiles the programs for the waiting requests, without generating ids.

        Do not use the scheduler afterwards, because the requests are then both in slots and in the
        queue.
        """
        with jax.set_mesh(self.engine.mesh):
            units = self._waiting_units(self._resize())
            count = 1
            while True:  # for each number of prompts that one prefill can take
                self._prefill(list(enumerate(units[: min(count, len(self._groups))])))
                if count >= min(len(self._groups), len(units)):
                    break
                count *= 2
        self._max_steps = 0
        self.step()

    def _admit(self) -> list[_Unit]:
        """Gives free groups to waiting requests, and returns the admitted units."""
        if not self._waiting:
            return []
        if not any(self._groups) and not self._suits_waiting():
            self._resize()
        free = [group for group, unit in enumerate(self._groups) if unit is None]
        admitted: list[tuple[int, _Unit]] = []
        while self._waiting and len(admitted) < len(free):
            number = self._waiting[0]
            request = self._requests[number]
            assert self._sizes is not None
            if not self._sizes.fits(request):
                break  # it waits until all slots are empty; the requests behind it wait, too
            start = self._started[number]
            stop = min(start + self._sizes.samples, len(request.samples))
            admitted.append((free[len(admitted)], _Unit(number, range(start, stop))))
            self._started[number] = stop
            if stop == len(request.samples):
                self._waiting.popleft()
                del self._started[number]
        if admitted:
            self._prefill(admitted)
        return [unit for _, unit in admitted]

    def _suits_waiting(self) -> bool:
        """Returns whether the current sizes suit the waiting requests, if no request runs."""
        sizes = self._sizes
        if sizes is None or not sizes.fits(self._requests[self._waiting[0]]):
            return False
        if self._min_sizes is not None or len(self._waiting_units(sizes)) <= sizes.groups:
            return True
        wanted = BatchSizes.of(self.engine, self._waiting_requests())
        return (wanted.groups, wanted.samples) == (sizes.groups, sizes.samples)

    def _waiting_requests(self) -> list[TokenRequest]:
        return [self._requests[number] for number in self._waiting]

    def _resize(self) -> BatchSizes:
        """Creates a new state with sizes that suit the waiting requests, and returns the sizes."""
        sizes = BatchSizes.of(self.engine, self._waiting_requests())
        if self._sizes is not None:
            sizes = self._sizes.grow(sizes)
        if self._min_sizes is not None:
            sizes = sizes.grow(self._min_sizes)
        self._sizes, self._groups = sizes, [None] * sizes.groups
        self._state = init_state(
            self.engine.decoder.config, replicate(self._row_inputs([])), sizes.prompt_lengths,
            sizes.max_new_tokens, self.engine.cache_dtype, len(self.engine.decoder.stacks),
        )  # fmt: skip
        return sizes

    def _waiting_units(self, sizes: BatchSizes) -> list[_Unit]:
        """Returns the waiting samples, divided into units for groups of these sizes."""
        units = []
        for number in self._waiting:
            count = len(self._requests[number].samples)
            for start in range(self._started[number], count, sizes.samples):
                units.append(_Unit(number, range(start, min(start + sizes.samples, count))))
        return units

    def _prefill(self, units: Sequence[tuple[int, _Unit]]) -> None:
        """Prefills free groups with the prompts of units.

        Args:
          units: pairs of a group and its new unit.
        """
        assert self._state is not None and self._sizes is not None
        source = np.full(len(self._groups), -1, np.int32)
        for index, (group, unit) in enumerate(units):
            source[group], self._groups[group] = index, unit
        count = min(round_up_rows(next_power_of_two(len(units))), len(self._groups))
        requests = [self._requests[unit.request] for _, unit in units]
        requests += [requests[-1]] * (count - len(requests))
        prompts = [
            self.engine.pad([stream_ids(request, stream) for request in requests])
            for stream in range(len(self._sizes.prompt_lengths))
        ]
        self._state = prefill(
            self.engine.decoder, self._state, replicate(source), prompts,
            replicate(self._row_inputs(units)),
        )  # fmt: skip

    def _row_inputs(self, units: Sequence[tuple[int, _Unit]]) -> RowInputs:
        """Returns the inputs of all rows. Rows without a sample in `units` have an empty grammar.

        Args:
          units: pairs of a group and its unit.
        """
        assert self._sizes is not None
        sizes = self._sizes
        grammars: list[list[Grammar]] = [[()] * sizes.samples for _ in range(sizes.groups)]
        params = [[sizes.variants[0]] * sizes.samples for _ in range(sizes.groups)]
        seeds = np.zeros((sizes.groups, sizes.samples, 2), np.uint32)
        for group, unit in units:
            request = self._requests[unit.request]
            salt = zlib.crc32(np.asarray(request.streams[0], np.int32).tobytes())
            for slot, number in enumerate(unit.samples):
                sample: Sample = request.samples[number]
                grammars[group][slot] = request.grammar
                params[group][slot] = sample.params
                seeds[group, slot] = salt, sample.seed
        return RowInputs(
            GrammarState.of(grammars, len(sizes.prompt_lengths), sizes.spans),
            BatchedParams.of(params, sizes.variants),
            seeds,  # type: ignore[arg-type]  # NumPy, because `replicate` follows
        )

    def _release(self, group: int, unit: _Unit) -> None:
        """Frees a group, and removes its request if all samples of the request are finished."""
        self._groups[group] = None
        self._unfinished[unit.request] -= len(unit.samples)
        if not self._unfinished[unit.request]:
            del self._requests[unit.request], self._unfinished[unit.request]

    @staticmethod
    def _is_image(request: TokenRequest, span: int) -> bool:
        return span < len(request.grammar) and isinstance(request.grammar[span], ImageSpan)


def run(
    engine: Engine, requests: Iterable[TokenRequest], every: int | None = None
) -> Iterator[Event]:
    """Yields the events of these requests until all are finished.

    Args:
      engine: the engine with the decoder.
      requests: the requests. Their numbers in events count from 0, in order.
      every: see `Scheduler`.

    Raises:
      UserError, ValueError: see `Engine.check`; the message names the request. No request is run.
    """
    scheduler = Scheduler(engine, every)
    for number, request in enumerate(requests):
        try:
            scheduler.submit(request)
        except (UserError, ValueError) as error:
            raise type(error)(f"request {number}: {error}") from error
    while scheduler.is_busy:
        yield from scheduler.step()


def generate(engine: Engine, requests: Sequence[TokenRequest]) -> list[list[list[SpanOutput]]]:
    """Generates all samples of all requests.

    A sample depends only on its prompt, grammar, parameters and seed, not on other samples.

    Returns:
      The outputs by [request][sample]: one output for each span that the sample has reached.

    Raises:
      UserError, ValueError: see `run`.
      UserError: no id could be sampled for a sample.
    """
    outputs: list[list] = [[None] * len(request.samples) for request in requests]
    for event in run(engine, requests):
        if isinstance(event, Failed):
            raise UserError(f"request {event.request}: {event.error}") from event.error
        if isinstance(event, Done):
            outputs[event.request][event.sample] = event.outputs
    return outputs


def _not_finite(count: int) -> UserError:
    return UserError(
        f"after {count} ids no id could be sampled: no score that the grammar allows was finite; "
        "use less guidance, or a model whose weights are sound"
    )
