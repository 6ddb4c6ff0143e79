"""The miner's parts, on one device, on eight, on two processes, and compiled for TPUs."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leon_jax.retrieval import device_blocks, mining
from tests import tpu

ROOT = Path(__file__).resolve().parents[2]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32),
    st.sampled_from([(256, 1), (256, 5), (256, 60), (256, 256), (640, 7), (100, 3)]),
    st.sampled_from([1, 32]),
    st.sampled_from([2, 40, 100_000]),
)
def test_two_stages_choose_what_a_stable_sort_does(seed, shape, smallest, values):
    width, k = shape
    scores = np.random.default_rng(seed).integers(0, values, (3, width)).astype(np.float32)
    scores[scores == 1] = -np.inf
    found, places = jax.jit(mining.top_k, static_argnums=(1, 2))(scores, k, smallest)
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(places, expected)
    np.testing.assert_array_equal(found, np.take_along_axis(scores, expected, axis=1))


@given(st.integers(0, 2**31 - 1), st.integers(1, 512), st.integers(4, 4096))
def test_blocks_fit_and_are_hardly_larger_than_what_they_hold(count, devices, row_bytes):
    sizes = device_blocks.Sizes(tile=1024, queries=1, queries_exact=1, block=2**22)
    size, tile = device_blocks.block_size(count, devices, row_bytes, sizes)
    each, odd = divmod(size, devices)
    assert odd == 0 and each % tile == 0 and tile % device_blocks.LANES == 0 and tile <= sizes.tile
    assert each == tile or each * row_bytes <= sizes.block
    number = -(-count // size)
    # Not a row of the lanes more than needed in any tile, and a row for each device.
    assert number * size - count < (number * each // tile * device_blocks.LANES + 1) * devices


def test_the_branch_for_tpus_finds_the_best_of_bins():
    """Run on a CPU, where `approx_max_k` leaves nothing out."""
    rng = np.random.default_rng(0)
    rows = rng.integers(-2, 3, (512, 8)).astype(np.float16)
    queries, allowed = rows[:4].astype(np.float32), rng.random(512) < 0.5
    empty = np.full((4, 5), -np.inf, np.float32), np.full((4, 5), -1, np.int32)
    mesh = jax.sharding.get_mesh()
    local = functools.partial(
        mining._local, axes=mesh.axis_names, on_tpu=True, tile=128, recall=0.9
    )
    split = jax.P(mesh.axis_names)
    run = jax.shard_map(local, in_specs=(*[split] * 5, jax.P()), out_specs=(split, split))
    arrays = jax.device_put((*empty, queries, rows, allowed), jax.NamedSharding(mesh, split))
    scores, ids = jax.jit(run)(*arrays, np.int32(1000))
    exact = np.where(allowed, queries @ rows.T.astype(np.float32), -np.inf)
    np.testing.assert_array_equal(scores, -np.sort(-exact, axis=1)[:, :5])
    np.testing.assert_array_equal(np.take_along_axis(exact, np.asarray(ids) - 1000, axis=1), scores)


def run(*command):
    return subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )


@pytest.mark.parametrize("processes", [1, 2])
def test_every_mesh_of_eight_devices_finds_what_a_sort_finds(processes):
    program = [sys.executable, str(Path(__file__).with_name("on_eight_devices.py"))]
    if processes > 1:
        launcher = [sys.executable, str(ROOT / "launch" / "local.py")]
        program = [*launcher, f"--processes={processes}", "--devices=4", "--", *program]
    done = run(*program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("equal") == 2, done.stdout


@pytest.mark.parametrize("recall", [1.0, 0.99])
def test_on_tpus_no_score_is_in_device_memory_and_devices_exchange_no_rows(recall):
    documents, k, devices = 2_000_000, 128, 8
    done = subprocess.run(
        [
            sys.executable, "-m", "benchmarks.mining_plan", "--topology=v5e:2x4",
            f"--documents={documents}", f"--k={k}", f"--recall={recall}",
        ],
        env=tpu.environment(), cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    queries = found["queries"]
    assert found["devices"] * found["rows"] >= documents
    # The bank in float16 and a byte of the mask, lists and queries.
    held = found["rows"] * (2 * 512 + 1) + queries / devices * (2 * 4 * k + 4 * 512)
    assert found["held"] == pytest.approx(held, rel=0.01)
    assert found["working"] < 4 * queries * found["tile"] / 4
    # A list of scores and one of ids for each query, and the queries themselves.
    sent = {kind: each["bytes_sent"] for kind, each in found["collectives"].items()}
    others = (devices - 1) / devices
    assert sent.pop("all-to-all") == 2 * 4 * k * queries * others
    assert sent.pop("all-gather") == (4 if recall == 1 else 2) * 512 * queries * others
    assert not any(sent.values())
