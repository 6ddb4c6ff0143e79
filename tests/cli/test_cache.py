"""Tests `leon cache`: the listing, the sizes and the removal."""

import pytest

from leon_jax import compilation_cache
from leon_jax.cli import main


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Returns a cache with a program of 2 MB, two prepared folders and an unrelated file."""
    for name in ("JAX_COMPILATION_CACHE_DIR", "LEON_CACHE_LIMIT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LEON_CACHE", str(tmp_path / "cache"))
    for name, size in (
        ("compiled/jit_f-cache", 2_000_000),
        ("emoji/images", 500_000),
        ("emoji-0123/manifest.json", 0),
        ("emoji-0123/records", 1_200_000),
        ("other/notes", 100),
    ):
        path = tmp_path / "cache" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(size))
    return tmp_path / "cache"


def leon(capsys, *arguments: str) -> tuple[int, list[str], str]:
    code = main.run(["cache", *arguments])
    printed = capsys.readouterr()
    return code, printed.out.splitlines(), printed.err


def test_the_contents_are_listed_with_sizes(capsys, folder, monkeypatch):
    monkeypatch.setenv("LEON_CACHE_LIMIT", "3GB")
    code, lines, _ = leon(capsys)
    assert code == 0
    assert [line.split() for line in lines] == [
        ["compiled", "programs", "2.0", "MB", str(folder / "compiled")],
        ["emoji", "images", "0.5", "MB", str(folder / "emoji")],
        ["prepared", "folder", "1.2", "MB", str(folder / "emoji-0123")],
        ["total", "3.7", "MB"],
        ["limit", "of", "compiled", "programs:", "3,000.0", "MB"],
    ]


def test_clear_removes_programs_and_clear_all_also_prepared_folders(capsys, folder):
    code, lines, _ = leon(capsys, "--clear")
    assert code == 0
    assert lines == [f"removed 2.0 MB of compiled programs from {folder / 'compiled'}"]
    assert (folder / "emoji-0123" / "records").exists()
    code, lines, _ = leon(capsys, "--clear-all")
    assert code == 0
    assert lines[1:] == [
        f"removed 0.5 MB: {folder / 'emoji'}",
        f"removed 1.2 MB: {folder / 'emoji-0123'}",
    ]
    assert {path.name for path in folder.iterdir()} == {"compiled", "other"}


def test_workdir_selects_the_programs_of_that_run(capsys, folder, tmp_path):
    run = tmp_path / "run"
    (run / "compile_cache").mkdir(parents=True)
    (run / "compile_cache" / "step-cache").write_bytes(bytes(100_000))
    (run / "config.json").write_text("{}")
    code, lines, _ = leon(capsys, f"--workdir={run}", "--clear")
    assert code == 0
    assert lines == [f"removed 0.1 MB of compiled programs from {run / 'compile_cache'}"]
    assert (run / "config.json").exists() and (folder / "compiled" / "jit_f-cache").exists()


def test_a_missing_cache_is_listed_and_cleared_as_empty(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("LEON_CACHE", str(tmp_path / "none"))
    assert leon(capsys, "--clear-all")[0] == 0
    code, lines, _ = leon(capsys)
    assert code == 0 and lines[1].split() == ["total", "0.0", "MB"]
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--clear_all", "--workdir=."], "--clear_all cannot be used with --workdir"),
        (["--workdir=nowhere"], "--workdir=nowhere is not a folder; it must be a training"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(capsys, folder, arguments, message):
    code, lines, error = leon(capsys, *arguments)
    assert code == 2 and not lines and message in error


def test_a_folder_that_cannot_be_removed_is_named(capsys, folder, monkeypatch):
    def refuse(path):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(compilation_cache.shutil, "rmtree", refuse)
    code, _, error = leon(capsys, "--clear-all")
    assert code == 2
    assert error == f"leon cache: cannot remove {folder / 'emoji'}: Operation not permitted\n"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs://bucket/x")
    code, _, error = leon(capsys)
    assert code == 2 and "JAX_COMPILATION_CACHE_DIR=gs://bucket/x is an address" in error
