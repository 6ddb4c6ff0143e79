"""The scheduler while requests come, are cancelled and fail."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from leon_jax import sharding
from leon_jax.config import UserError
from leon_jax.engine.compiled_shapes import BatchSizes
from leon_jax.engine.grammar import ImageSpan, TextSpan
from leon_jax.engine.guidance import ClassifierFree, Contrastive, Guidance, Plain, TwoConditions
from leon_jax.engine.samplers import Categorical, Greedy
from leon_jax.engine.sampling_params import BatchedParams, SamplingParams
from leon_jax.engine.scheduler import Admitted, Done, Failed, Scheduler, generate
from tests.engine.small import (
    GRAMMARS,
    GUIDED,
    IMAGE,
    INFILLS,
    STORY,
    VOCABULARY,
    all_ids,
    make,
    prompt,
)

REQUESTS = [
    prompt(3, IMAGE, seeds=(1, 2, 3)),
    prompt(12, STORY, seeds=(3,)),
    prompt(7, INFILLS, SamplingParams(Contrastive(0.3, 4), Categorical(0.7), Greedy()), (5, 6)),
    prompt(8, (TextSpan.infill(VOCABULARY, 9),), SamplingParams(), seeds=(7,)),
    prompt(9, (ImageSpan(4),), SamplingParams(Plain(), Categorical(top_p=0.5)), seeds=(9, 10)),
    prompt(6, IMAGE, SamplingParams(TwoConditions(2.0, 4.0), Categorical(top_k=5)), seeds=(1,)),
    prompt(14, IMAGE, seeds=(4,)),
]


def finish(scheduler: Scheduler) -> list:
    """All events until nothing is left."""
    events = []
    while scheduler.is_busy:
        events += scheduler.step()
    return events


def outputs_of(events, number: int) -> dict[int, list[int]]:
    """The ids of each finished sample of a request."""
    return {
        event.sample: all_ids(event.outputs).tolist()
        for event in events
        if isinstance(event, Done) and event.request == number
    }


@pytest.fixture(scope="module")
def engine():
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        return make(4, slots=4)


@pytest.fixture(scope="module")
def alone(engine):
    """What each request generates by itself, with the programs of all of them."""
    answers = []
    for request in REQUESTS:
        scheduler = Scheduler(engine, sizes=BatchSizes.of(engine, REQUESTS))
        number = scheduler.submit(request)
        answers.append(outputs_of(finish(scheduler), number))
    return answers


@pytest.mark.slow
@pytest.mark.parametrize("order", range(20))
def test_any_order_of_arrival_gives_the_same_ids(engine, alone, order):
    """Requests come in random order, several at once or one by one, while others run."""
    rng = np.random.default_rng(order)
    # Of one size, so that one program serves all orders.
    scheduler = Scheduler(engine, sizes=BatchSizes.of(engine, REQUESTS))
    numbers, events = {}, []
    for index in rng.permutation(len(REQUESTS)):
        numbers[scheduler.submit(REQUESTS[index])] = index
        for _ in range(rng.integers(3)):
            events += scheduler.step()
    events += finish(scheduler)
    for number, index in numbers.items():
        assert outputs_of(events, number) == alone[index]
    assert len([e for e in events if isinstance(e, Done)]) == sum(map(len, alone))


def test_a_request_is_admitted_before_it_is_done_and_each_sample_once(engine):
    scheduler = Scheduler(engine)
    number = scheduler.submit(prompt(5, IMAGE, seeds=range(9)))
    admitted, done = [], []
    for event in finish(scheduler):
        assert event.request == number
        if isinstance(event, Admitted):
            admitted += event.samples
        else:
            assert event.sample in admitted
            done.append(event.sample)
    assert sorted(done) == sorted(admitted) == list(range(9))
    assert scheduler.step() == [] and not scheduler.is_busy


def test_a_cancelled_request_gives_its_slots_to_others(engine, alone):
    scheduler = Scheduler(engine, every=1)
    running = scheduler.submit(prompt(5, (ImageSpan(30),), seeds=(1, 2, 3, 4)))
    waiting = scheduler.submit(REQUESTS[1])
    other = scheduler.submit(REQUESTS[0])
    events = scheduler.step()
    assert {event.request for event in events} == {running}
    scheduler.cancel(running)
    scheduler.cancel(waiting)
    scheduler.cancel(99)  # not in the queue
    events = finish(scheduler)
    assert {event.request for event in events} == {other}
    assert outputs_of(events, other) == alone[0]
    scheduler.cancel(other)  # no longer in the queue


def test_a_request_that_needs_larger_sizes_waits_until_the_slots_are_empty(engine, alone):
    scheduler = Scheduler(engine)
    small, large = scheduler.submit(REQUESTS[4]), None
    events = scheduler.step()
    large = scheduler.submit(REQUESTS[5])  # more streams
    events += finish(scheduler)
    assert outputs_of(events, small) == alone[4] and outputs_of(events, large) == alone[5]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Broken(Guidance):
    """All logits are this number."""

    value: float
    conditions: ClassVar = ("all",)

    def __call__(self, logits):
        return jnp.full_like(logits[0], 1.0) * self.value

    def check(self):
        pass


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stubborn:
    """Always samples one id, whatever the logits are."""

    chosen: int = dataclasses.field(metadata={"static": True})

    def __call__(self, logits, keys):
        return jnp.full(len(logits), self.chosen)

    def check(self):
        pass


@pytest.mark.parametrize(
    ("grammar", "params"),
    [
        (IMAGE, SamplingParams(Broken(float("nan")))),
        (IMAGE, SamplingParams(Broken(float("-inf")), Greedy())),
        (IMAGE, SamplingParams(image=Stubborn(24))),
        (IMAGE, SamplingParams(image=Stubborn(-1))),
        (GRAMMARS[1], SamplingParams(text=Stubborn(VOCABULARY.image_start))),
    ],
)
def test_a_sample_without_a_usable_id_fails_alone(engine, alone, grammar, params):
    scheduler = Scheduler(engine)
    bad = scheduler.submit(prompt(4, grammar, params))
    good = scheduler.submit(REQUESTS[0])
    events = finish(scheduler)
    (failed,) = (event for event in events if isinstance(event, Failed))
    assert failed.request == bad and "no id could be sampled" in str(failed.error)
    assert outputs_of(events, bad) == {} and outputs_of(events, good) == alone[0]
    with pytest.raises(UserError, match="request 0: after 0 ids no id could be sampled"):
        generate(engine, [prompt(4, grammar, params)])


@pytest.mark.parametrize("value", [float("inf"), 3e38])
def test_logits_that_are_all_infinite_or_huge_can_be_sampled(engine, value):
    ((outputs,),) = generate(engine, [prompt(4, IMAGE, SamplingParams(Broken(value)))])
    assert VOCABULARY.is_image(outputs[0].ids).all() and len(outputs[0].ids) == 9


def test_guidance_of_any_weight_keeps_to_the_grammar(engine):
    for guidance in (ClassifierFree(1e38), TwoConditions(1e38, 3e38)):
        scheduler = Scheduler(engine)
        scheduler.submit(prompt(4, IMAGE, SamplingParams(guidance), seeds=range(8)))
        for event in finish(scheduler):
            if isinstance(event, Done):
                assert VOCABULARY.is_image(event.outputs[0].ids).all()
    with pytest.raises(UserError, match="finite in float32"):
        ClassifierFree(1e39).check()


@pytest.mark.parametrize(
    "sampler",
    [Greedy(), Categorical(), Categorical(0.1, top_p=0.9), Categorical(2.0, top_k=3),
     Categorical(1e-44)],
)  # fmt: skip
def test_no_sampler_returns_a_forbidden_id(sampler):
    """Whatever stands among the logits: NaN, infinities, huge numbers."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(64, 1, 30)).astype(np.float32)
    special = np.array([np.nan, np.inf, -np.inf, 3e38, -3e38], np.float32)
    chosen = rng.random(logits.shape) < 0.4
    logits[chosen] = special[rng.integers(5, size=chosen.sum())]
    forbidden = rng.random(logits.shape) < 0.5
    logits[forbidden] = -np.inf
    params = SamplingParams(text=sampler)
    batch = BatchedParams.of([[params]] * 64, [params])
    keys = jax.vmap(jax.random.key)(jnp.arange(64))[:, None]
    ids, usable = map(np.asarray, batch.sample_text(jnp.asarray(logits), keys))
    picked = np.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
    assert usable.mean() > 0.9
    assert (picked[usable] > -np.inf).all()  # neither forbidden nor NaN
    has_usable = (np.nan_to_num(logits, nan=-np.inf, posinf=1, neginf=-np.inf) > -np.inf).any(-1)
    np.testing.assert_array_equal(usable, has_usable)


def test_parameters_go_through_json():
    for params in (
        SamplingParams(),
        SamplingParams.of(guidance=3, temperature=0, top_p=0.9, max_tokens=7),
        SamplingParams(Contrastive(0.3, 4), Categorical(top_k=5), Greedy(), 2, 9),
        SamplingParams(TwoConditions(1.5, 7.5)),
        GUIDED,
    ):
        assert SamplingParams.from_dict(params.to_dict()) == params
    assert SamplingParams.from_dict({"guidance": {"type": "Plain"}}) == SamplingParams()
    for values, message in (
        ({"temperature": 1}, "sampling.temperature is unknown; its keys are guidance"),
        ({"image": {"type": "Beam"}}, "one of Greedy, Categorical"),
        ({"image": 3}, "sampling.image is 3"),
        ({"guidance": {"type": "ClassifierFree", "scale": 2}}, "no such field"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": "3"}, "sampling.max_tokens is '3'; it must be a number"),
        ({"image": {"type": "Categorical", "top_p": "x"}}, "sampling.image.top_p is 'x'"),
    ):
        with pytest.raises(UserError, match=message):
            SamplingParams.from_dict(values)


def test_a_temperature_too_small_for_float32_is_greedy():
    assert SamplingParams.of(temperature=1e-45).image == Greedy()
    assert SamplingParams.of(temperature=1e-37).image == Categorical(1e-37)
