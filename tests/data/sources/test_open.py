"""Opening a source: each kind by its name, and a sentence where a package is missing."""

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
def test_a_missing_package_is_named_with_its_extra(kind, package, extra, monkeypatch):
    monkeypatch.delitem(sys.modules, f"leon_jax.data.sources.{kind}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{package}; run: pip install 'leon_jax\[{extra}\]'"):
        open_source(SourceConfig(kind, "x"))


def test_an_unknown_kind_is_named():
    with pytest.raises(UserError, match=r"kind is 'csv'; it must be one of .*jsonl, parquet"):
        open_source(SourceConfig("csv", "x"))


class Mine:
    """A source that is not part of the package."""

    def __init__(self, config):
        self.config = config


def test_a_data_set_can_bring_its_own_kind(monkeypatch):
    monkeypatch.setattr(opening, "_KINDS", dict(opening._KINDS))
    target = f"{__name__}:Mine"
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or types.ModuleType("m"))
    monkeypatch.setattr(sys.modules[__name__], "Mine", Mine, raising=False)
    for _ in range(2):  # a module may be loaded twice
        register("mine", target, extra="demo")
    config = SourceConfig("mine", "x")
    assert isinstance(open_source(config), Mine) and open_source(config).config == config
    with pytest.raises(ValueError, match="the source kind 'jsonl' is leon_jax"):
        register("jsonl", target, extra="demo")


def test_a_source_loads_no_package_but_its_own(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}")
    program = (
        "import sys; from leon_jax.data.sources.open import open_source;"
        "from leon_jax.data.sources.raw_record import SourceConfig;"
        f"list(open_source(SourceConfig('jsonl', {str(tmp_path)!r})).read('a.jsonl:1'));"
        "loaded = {'pyarrow', 'datasets', 'tensorflow_datasets', 'webdataset'} & set(sys.modules);"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
