"""Compiled programs are found again, take no more than their limit, and can be removed."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from leon_jax import compilation_cache
from leon_jax.config import UserError

PROGRAM = """
import json, sys
import jax
from leon_jax.compilation_cache import use_compilation_cache

kept = use_compilation_cache(sys.argv[1])
hits = []
jax.monitoring.register_event_listener(
    lambda name, **_: hits.append(name) if name == "/jax/compilation_cache/cache_hits" else None)
for scale in range(int(sys.argv[2])):
    jax.jit(lambda x: x * scale + 1)(2.0)
print(json.dumps([kept, len(hits), jax.config.jax_compilation_cache_max_size]))
"""


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in ("JAX_COMPILATION_CACHE_DIR", "LEON_CACHE", "LEON_CACHE_LIMIT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(__file__).parents[1]))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


def compile_in(folder, programs: int, **environment: str) -> list:
    """Compiles small programs in a process of its own: [folder, hits, limit in bytes]."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), str(programs)],
        capture_output=True, text=True, env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def programs_in(folder: pathlib.Path) -> list[pathlib.Path]:
    return list(folder.glob("*-cache"))


def test_small_programs_are_found_again_and_the_limit_holds(tmp_path):
    folder = tmp_path / "a" / "compiled"
    assert compile_in(folder, 3) == [str(folder), 0, 5_000_000_000]
    kept = programs_in(folder)
    assert len(kept) >= 3
    assert compile_in(folder, 3)[1] == len(kept)
    # Room for two of the largest: the ones that were used last.
    room = 2 * max(path.stat().st_size for path in kept) + 1000
    compile_in(folder, 6, LEON_CACHE_LIMIT=f"{room / 1e6}MB")
    assert sum(path.stat().st_size for path in programs_in(folder)) <= room
    assert programs_in(folder)


def test_jaxs_own_variable_names_the_folder(tmp_path):
    named = tmp_path / "named"
    found = compile_in(tmp_path / "ours", 1, JAX_COMPILATION_CACHE_DIR=str(named))
    assert found == [str(named), 0, -1]
    assert programs_in(named) and not (tmp_path / "ours").exists()


def test_a_folder_that_cannot_be_written_is_named_and_nothing_is_kept(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert compilation_cache.use_compilation_cache(tmp_path / "file" / "x") is None
    said = capsys.readouterr().err
    assert said.startswith("compiled programs are not cached: cannot write ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("written", "size"), [("500MB", 5e8), ("1.5 gb", 1.5e9), ("2TB", 2e12), ("", 5e9), ("0MB", 0)]
)
def test_limits(monkeypatch, written, size):
    monkeypatch.setenv("LEON_CACHE_LIMIT", written)
    assert compilation_cache.limit() == size


@pytest.mark.parametrize("written", ["much", "5", "-1GB", "5GBs", "GB"])
def test_a_limit_that_is_no_size_is_refused(monkeypatch, written):
    monkeypatch.setenv("LEON_CACHE_LIMIT", written)
    with pytest.raises(UserError, match=f"LEON_CACHE_LIMIT is '{written}'; it must be a size"):
        compilation_cache.limit()


def test_only_what_jax_writes_is_removed(tmp_path):
    for name in ("jit_f-1-cache", "jit_f-1-atime", ".lockfile", "mine.txt"):
        (tmp_path / name).write_text("12345")
    (tmp_path / "xla_gpu_per_fusion_autotune_cache_dir").mkdir()
    (tmp_path / "xla_gpu_per_fusion_autotune_cache_dir" / "x").write_text("123")
    assert compilation_cache.size(tmp_path) == 23
    assert compilation_cache.clear(tmp_path) == 13
    assert {path.name for path in tmp_path.iterdir()} == {".lockfile", "mine.txt"}
    assert compilation_cache.clear(tmp_path / "nothing") == 0
