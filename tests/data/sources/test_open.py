"""Opening a source by its kind, and the errors for missing packages."""

import subprocess
import sys
import types

import pytest

from leon_jax.config import UserError
from leon_jax.data.sources import open as opening
from leon_jax.data.sources.open import open_source, register
from leon_jax.data.sources.raw_record import SourceConfig


@pytest.mark.parametrize(
    ("kind", "package", "extra"),
    [
        ("parquet", "pyarrow", "data"),
        ("tfds", "tensorflow_datasets", "data"),
        ("huggingface", "datasets", "huggingface"),
    ],
)
def test_a_missing_package_raises_an_error_that_names_its_extra(kind, package, extra, monkeypatch):
    monkeypatch.delitem(sys.modules, f"leon_jax.data.sources.{kind}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{package}; run: pip install 'leon_jax\[{extra}\]'"):
        open_source(SourceConfig(kind, "x"))


def test_an_unknown_kind_raises_an_error():
    with pytest.raises(UserError, match=r"kind is 'csv'; it must be one of .*jsonl, parquet"):
        open_source(SourceConfig("csv", "x"))


class External:
    """A source outside of the package."""

    def __init__(self, config):
        self.config = config


def test_a_dataset_can_register_a_kind(monkeypatch):
    monkeypatch.setattr(opening, "_KINDS", dict(opening._KINDS))
    target = f"{__name__}:External"
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or types.ModuleType("m"))
    monkeypatch.setattr(sys.modules[__name__], "External", External, raising=False)
    for _ in range(2):  # a module may be loaded twice
        register("external", target, extra="demo")
    config = SourceConfig("external", "x")
    assert isinstance(open_source(config), External) and open_source(config).config == config
    with pytest.raises(ValueError, match="kind 'jsonl' is already registered as leon_jax"):
        register("jsonl", target, extra="demo")


def test_a_source_imports_only_its_packages(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}")
    program = (
        "import sys; from leon_jax.data.sources.open import open_source;"
        "from leon_jax.data.sources.raw_record import SourceConfig;"
        f"list(open_source(SourceConfig('jsonl', {str(tmp_path)!r})).read('a.jsonl:1'));"
        "loaded = {'pyarrow', 'datasets', 'tensorflow_datasets', 'webdataset'} & set(sys.modules);"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
