"""Tests data shards: every mesh gets the same batches, and a feed resumes exactly."""

import subprocess
import sys

import grain
import numpy as np
import pytest

from leon_jax.config import UserError
from leon_jax.train.global_batches import Feed
from tests import simulated_devices


def numbers(shard, shards):
    """Returns one shard of batches of 8 rows of three numbers."""
    data = grain.MapDataset.range(1000).seed(3).shuffle().repeat()
    data = data.slice(slice(shard, None, shards)).map(lambda n: {"x": np.arange(3) + 10 * n})
    return data.batch(8 // shards).to_iter_dataset()


def test_a_batch_is_the_concatenation_of_its_shards():
    feed, iterators = Feed(numbers, 4), [iter(numbers(shard, 4)) for shard in range(4)]
    for _ in range(3):
        parts = np.concatenate([next(iterator)["x"] for iterator in iterators])
        np.testing.assert_array_equal(next(feed)["x"], parts)


def test_a_new_feed_resumes_from_the_state_of_another():
    feed = Feed(numbers, 2)
    for _ in range(5):
        next(feed)
    state, expected = feed.get_state(), [np.asarray(next(feed)["x"]) for _ in range(3)]
    resumed = Feed(numbers, 2)
    resumed.set_state(state)
    for batch in expected:
        np.testing.assert_array_equal(next(resumed)["x"], batch)
    with pytest.raises(UserError, match=r"data_shards is 4, but the checkpoint has 2 data shards"):
        Feed(numbers, 4).set_state(state)


def test_zero_shards_are_refused():
    with pytest.raises(UserError, match="data_shards is 0"):
        Feed(numbers, 0)


EIGHT = """
import jax, numpy as np
from leon_jax import sharding
from leon_jax.train.global_batches import Feed, local_shards
from tests.train.test_global_batches import numbers
with jax.set_mesh(sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])):
    expected = np.asarray(next(Feed(numbers, 4))["x"])
for shape in [(8, 1, 1, 1), (2, 2, 2, 1), (1, 1, 2, 4), (1, 1, 1, 8)]:
    mesh = sharding.make_mesh(shape)
    with jax.set_mesh(mesh):
        batch = next(Feed(numbers, 4))["x"]
        assert batch.sharding.spec == sharding.spec("batch"), batch.sharding
        np.testing.assert_array_equal(batch, expected)
        assert local_shards(sharding.batch_sharding(), 4) == [0, 1, 2, 3]
print("same")
"""


def test_every_mesh_gets_the_same_batches():
    result = subprocess.run(
        [sys.executable, "-c", EIGHT],
        env=simulated_devices.environment(),
        capture_output=True,
        text=True,
    )
    assert result.stdout.strip() == "same", result.stderr
