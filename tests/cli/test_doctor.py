"""`leon doctor`: what it reports, and that it works where JAX does not start."""

import json

import pytest

from leon_jax.cli import doctor, main


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("LEON_CACHE", str(tmp_path / "cache"))

    def command(*flags: str) -> str:
        assert main.run(["doctor", *flags]) == 0
        return capsys.readouterr().out

    return command


def test_the_report_has_all_that_a_bug_report_begins_with(run, monkeypatch, tmp_path):
    (tmp_path / "cache" / "models").mkdir(parents=True)
    (tmp_path / "cache" / "models" / "x").write_bytes(bytes(1000))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("LEON_API_TOKEN", "secret words")
    printed = run("--json")
    report = json.loads(printed)
    for name in ("python", "leon_jax", "jax", "jaxlib", "flax", "orbax-checkpoint", "grain"):
        assert report["versions"][name]
    assert report["jax"]["backend"] == "cpu" and report["jax"]["devices"][0]["platform"] == "cpu"
    assert report["host"]["cores"] >= 1 and report["host"]["memory"] > 10**8
    assert {"TPU compiler", "peers", "extra tpu", "extra demo"} <= set(report["installed"])
    assert report["caches"][str(tmp_path / "cache" / "models")]["size"] == 1000
    assert report["environment"]["JAX_PLATFORMS"] == "cpu"
    assert report["environment"]["LEON_API_TOKEN"] == "(set)" and "secret" not in printed
    assert "missing" in report["shipped_model"]


def test_the_text_has_the_same_sections(run, monkeypatch):
    monkeypatch.setattr(doctor, "_jax", lambda seconds: {"error": "exit code 1: no chips"})
    lines = run().splitlines()
    sections = [line for line in lines if line and not line.startswith(" ")]
    assert sections == [
        "versions", "jax", "host", "installed", "caches", "environment", "shipped model"
    ]  # fmt: skip
    assert "  error  exit code 1: no chips" in lines


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("raise RuntimeError('no chips')", "exit code 1: RuntimeError: no chips"),
        ("import os; os.abort()", "exit code -6: it printed nothing"),
        ("import time; time.sleep(60)", "JAX did not start within 2 s"),
    ],
)
def test_the_reason_is_printed_where_jax_does_not_start(run, monkeypatch, program, message):
    monkeypatch.setattr(doctor, "_DEVICES", program)
    report = json.loads(run("--json", "--seconds=2"))
    assert message in report["jax"]["error"] and report["versions"]["jax"]


def test_a_platform_that_is_not_there_is_named(run, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "nonsense")
    assert "nonsense" in json.loads(run("--json"))["jax"]["error"]


def test_extras_follow_the_extras_of_their_packages(monkeypatch):
    """`leon_jax[tpu]` needs `jax[tpu]`, which needs libtpu."""
    versions = doctor._version
    hidden = "libtpu", "torch"
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in hidden else versions(name))
    extras = doctor._extras()
    assert "libtpu" in extras["tpu"] and extras["tpu"].startswith("missing: ")
    assert "torch" in extras["convert"] and extras["data"] == "installed"
