"""Tests `leon train`: mistakes give one sentence and exit code 2, and a text run works."""

import json
import pathlib
import runpy
import subprocess
import sys

import pytest

from leon_jax.tokenizers.text import TextTokenizer
from tests import document_folders

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
TEXT = f"--config={CONFIGS}/emoji/text.py"
TOKENIZER = f"--config={CONFIGS}/emoji/tokenizer.py"


def train(*arguments: str) -> subprocess.CompletedProcess:
    """Runs `leon train` in a new process, since config flags change absl's global state."""
    return subprocess.run(
        [sys.executable, "-m", "leon_jax.cli.main", "train", *arguments],
        capture_output=True, text=True, cwd=CONFIGS.parent, check=False,
    )  # fmt: skip


def refused(*arguments: str) -> str:
    """Runs `leon train`, checks that it exits with code 2, and returns its one line of error."""
    result = train(*arguments)
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("leon train: ")
    return result.stderr


def test_a_text_tokenizer_is_trained_from_the_command_line(tmp_path):
    folder = document_folders.write(tmp_path / "drawings", document_folders.drawings())
    workdir = tmp_path / "text"
    result = train(TEXT, f"--workdir={workdir}", f"--config.data.folder={folder}")
    assert result.returncode == 0, result.stderr
    size = TextTokenizer.load(workdir / "export" / "text.json").size
    assert 256 < size < 4096
    assert f"{size} entries instead of 4096 (config.size), since the texts have" in result.stderr


def test_missing_flags_are_named(tmp_path):
    assert "--config is missing" in refused(f"--workdir={tmp_path}")
    assert "--workdir is missing" in refused(TEXT)


def test_a_workdir_in_an_s3_bucket_or_elsewhere_is_refused():
    message = refused(TEXT, "--workdir=s3://bucket/run")
    assert "s3://bucket/run is in an S3 bucket, which Orbax cannot write checkpoints to" in message
    assert "http://x is not a path" in refused(TEXT, "--workdir=http://x")
    assert not (CONFIGS.parent / "s3:").exists()


def test_incomplete_process_flags_are_refused(tmp_path):
    workdir = f"--workdir={tmp_path / 'w'}"
    assert "need --distributed" in refused(TOKENIZER, workdir, "--processes=2")
    message = refused(TOKENIZER, workdir, "--distributed", "--processes=2", "--process_id=0")
    assert "give all of --coordinator, --processes and --process_id" in message
    assert not (tmp_path / "w").exists()


def test_a_missing_config_file_is_named(tmp_path):
    message = refused(f"--config={tmp_path}/none.py", f"--workdir={tmp_path}/w")
    assert "none.py" in message
    assert not (tmp_path / "w").exists()


def test_a_misspelt_key_on_the_command_line_is_named(tmp_path):
    message = refused(TOKENIZER, f"--workdir={tmp_path}/w", "--config.batch_sise=3")
    assert "unknown key config.batch_sise; did you mean config.batch_size?" in message
    assert not (tmp_path / "w").exists()


def test_a_misspelt_key_in_a_file_is_named(tmp_path):
    source = (CONFIGS / "emoji" / "tokenizer.py").read_text()
    (tmp_path / "bad.py").write_text(source.replace('"code_dim"', '"code_dimm"'))
    message = refused(f"--config={tmp_path}/bad.py", f"--workdir={tmp_path}/w")
    assert "unknown key config.model.code_dimm; did you mean config.model.code_dim?" in message
    assert not (tmp_path / "w").exists()


def test_missing_data_names_the_command_to_run(tmp_path):
    message = refused(
        TOKENIZER, f"--workdir={tmp_path}/w", f"--config.data.folder={tmp_path}/nothing"
    )
    assert "config.data: " in message and "nothing is not a documents folder" in message
    assert "leon prepare" in message
    assert not (tmp_path / "w").exists()


def test_a_mesh_that_does_not_cover_the_devices_is_refused(tmp_path):
    message = refused(TOKENIZER, f"--workdir={tmp_path}/w", "--config.loop.mesh=(3, 5, 1, 1)")
    assert "does not cover" in message


def test_a_wrong_number_of_slices_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    mesh = "--config.loop.mesh=(2, 1, 1, 1)", "--config.loop.slices=2"
    message = refused(TOKENIZER, f"--workdir={tmp_path}/w", *mesh)
    assert message.endswith(
        "slices is 2; it must be the number of TPU slices or, with one slice, the number of "
        "processes\n"
    )


def test_missing_process_flags_without_a_cluster_are_named(tmp_path):
    message = refused(TOKENIZER, f"--workdir={tmp_path}/w", "--distributed")
    assert message.endswith("give --coordinator=HOST:PORT, --processes and --process_id\n")
    ids = "--coordinator=127.0.0.1:1", "--processes=2", "--process_id=2"
    message = refused(TOKENIZER, f"--workdir={tmp_path}/w", "--distributed", *ids)
    assert "--process_id=2 must be below --processes=2" in message


@pytest.mark.parametrize("name", ["cm3leon_350m", "vqgan_256", "emoji/encoder", "emoji/decoder"])
def test_a_key_that_is_not_in_the_file_can_be_overridden(tmp_path, name):
    config = f"--config={CONFIGS}/{name}.py"
    message = refused(config, f"--workdir={tmp_path}/w", "--config.loop.data_shards=0")
    assert "data_shards is 0; it must be at least 1" in message


def test_a_run_with_another_configuration_is_not_resumed(tmp_path):
    folder = document_folders.write(tmp_path / "drawings", document_folders.drawings())
    workdir = tmp_path / "w"
    (workdir / "checkpoints" / "100").mkdir(parents=True)
    saved = runpy.run_path(str(CONFIGS / "emoji" / "tokenizer.py"))["get_config"]().to_dict()
    codes = saved["model"]["codes"]
    saved["model"]["codes"] = codes + 1
    (workdir / "config.json").write_text(json.dumps(saved))
    data = f"--config.data.folder={folder}", "--config.batch_size=4"
    message = refused(TOKENIZER, f"--workdir={workdir}", *data)
    assert f"model.codes = {codes + 1}, but it is now {codes}" in message
