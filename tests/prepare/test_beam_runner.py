"""Preparing on Apache Beam's local runner gives the same folder as preparing in this process."""

import pathlib

import pytest

from leon_jax.config import UserError
from leon_jax.prepare import prepare as preparing
from leon_jax.prepare.beam_runner import on_beam
from tests import tiny
from tests.listed import Listed
from tests.prepare.folders import files_of


def make(out, run, source=None):
    config, sources = tiny.preparation(
        tiny.folders()[0], {"train": tiny.documents(), "exam": tiny.held_out()}, shard_size=3
    )
    if source is not None:
        sources[0] = (sources[0][0], source)
    return preparing.prepare(config, out, sources=sources, run=run, progress=False)


def test_beam_writes_the_same_bytes_as_this_process(tmp_path):
    assert make(tmp_path / "here", None) == make(tmp_path / "beam", on_beam("DirectRunner"))
    assert files_of(tmp_path / "here") == files_of(tmp_path / "beam")


class Broken(Listed):
    """A source that raises an exception, which sources must not do."""

    def read(self, shard):
        if shard == "6-9":
            raise RuntimeError("the disk is on fire")
        yield from super().read(shard)


def test_a_failed_pipeline_raises_an_error_and_the_next_run_resumes(tmp_path, caplog):
    out, runner = tmp_path / "out" / "prepared", on_beam("DirectRunner")
    with pytest.raises(UserError, match=r"on DirectRunner failed; see its log$"):
        make(out, runner, Broken(tiny.documents(), 3))
    assert "the disk is on fire" in caplog.text
    assert not out.exists()
    (parts,) = pathlib.Path(out.parent).glob(".prepared.preparing/shards-*")
    finished = {path.name for path in parts.iterdir() if not path.name.startswith(".")}

    def run_remaining(config, sources, folder, shards):
        assert finished.isdisjoint(shard.name for shard in shards)
        runner(config, sources, folder, shards)

    make(out, run_remaining)
    make(tmp_path / "whole", None)
    assert files_of(out) == files_of(tmp_path / "whole")


def test_an_unknown_runner_raises_an_error(tmp_path):
    with pytest.raises(UserError, match="pipeline on SlowRunner failed"):
        make(tmp_path / "out", on_beam("SlowRunner"))
