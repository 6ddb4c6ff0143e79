"""The parts of a search, on one device, on eight, on two processes, and compiled for TPUs."""

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

from leon_jax.retrieval import device_blocks, exact_search
from tests import tpu

ROOT = Path(__file__).resolve().parents[2]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32),
    st.sampled_from([(256, 1), (256, 5), (256, 60), (256, 256), (640, 7), (100, 3)]),
    st.sampled_from([1, 32]),
    st.sampled_from([2, 40, 100_000]),
)
def test_top_k_equals_a_stable_sort(seed, shape, smallest, values):
    width, k = shape
    scores = np.random.default_rng(seed).integers(0, values, (3, width)).astype(np.float32)
    scores[scores == 1] = -np.inf
    values, positions = jax.jit(exact_search.top_k, static_argnums=(1, 2))(scores, k, smallest)
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(positions, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(scores, expected, axis=1))


@given(st.integers(0, 2**31 - 1), st.integers(1, 512), st.integers(4, 4096))
def test_blocks_fit_in_memory_with_little_padding(count, devices, row_bytes):
    sizes = device_blocks.BlockSizes(tile=1024, queries=1, queries_exact=1, block=2**22)
    size, tile = device_blocks.block_size(count, devices, row_bytes, sizes)
    device_rows, remainder = divmod(size, devices)
    assert remainder == 0 and device_rows % tile == 0
    assert tile % device_blocks.LANES == 0 and tile <= sizes.tile
    assert device_rows == tile or device_rows * row_bytes <= sizes.block
    number = -(-count // size)
    # The padding is below one group of lanes in each tile, and one row for each device.
    tiles = number * device_rows // tile
    assert number * size - count < (tiles * device_blocks.LANES + 1) * devices


def test_the_branch_for_tpus_returns_the_best_rows():
    """Runs on a CPU, where `approx_max_k` is exact."""
    rng = np.random.default_rng(0)
    rows = rng.integers(-2, 3, (512, 8)).astype(np.float16)
    queries, allowed = rows[:4].astype(np.float32), rng.random(512) < 0.5
    empty = np.full((4, 5), -np.inf, np.float32), np.full((4, 5), -1, np.int32)
    mesh = jax.sharding.get_mesh()
    local = functools.partial(
        exact_search._local_step, axes=mesh.axis_names, on_tpu=True, tile=128, recall=0.9
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
def test_every_mesh_of_eight_devices_returns_what_a_sort_returns(processes):
    program = [sys.executable, str(Path(__file__).with_name("on_eight_devices.py"))]
    if processes > 1:
        launcher = [sys.executable, str(ROOT / "launch" / "local.py")]
        program = [*launcher, f"--processes={processes}", "--devices=4", "--", *program]
    process = run(*program)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("equal") == 2, process.stdout


@pytest.mark.parametrize("recall", [1.0, 0.99])
def test_on_tpus_device_memory_has_no_scores_and_devices_exchange_no_rows(recall):
    documents, k, devices = 2_000_000, 128, 8
    process = subprocess.run(
        [
            sys.executable, "-m", "benchmarks.mining_plan", "--topology=v5e:2x4",
            f"--documents={documents}", f"--k={k}", f"--recall={recall}",
        ],
        env=tpu.environment(), cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    plan = json.loads(process.stdout)
    queries = plan["queries"]
    assert plan["devices"] * plan["rows"] >= documents
    # The rows in float16 with a byte of the mask each; the lists and the queries.
    resident = plan["rows"] * (2 * 512 + 1) + queries / devices * (2 * 4 * k + 4 * 512)
    assert plan["held"] == pytest.approx(resident, rel=0.01)
    assert plan["working"] < 4 * queries * plan["tile"] / 4
    # A list of scores and a list of ids for each query, and the queries.
    sent = {kind: counts["bytes_sent"] for kind, counts in plan["collectives"].items()}
    fraction = (devices - 1) / devices
    assert sent.pop("all-to-all") == 2 * 4 * k * queries * fraction
    assert sent.pop("all-gather") == (4 if recall == 1 else 2) * 512 * queries * fraction
    assert not any(sent.values())
