"""Opening a source: each kind by its name, and a sentence where a package is missing."""

import subprocess
import sys

import pytest

from leon_jax.config import UserError
from leon_jax.data.sources.open import open_source
from leon_jax.data.sources.raw import SourceConfig


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


def test_a_source_loads_no_package_but_its_own(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}")
    program = (
        "import sys; from leon_jax.data.sources.open import open_source;"
        "from leon_jax.data.sources.raw import SourceConfig;"
        f"list(open_source(SourceConfig('jsonl', {str(tmp_path)!r})).read('a.jsonl:1'));"
        "loaded = {'pyarrow', 'datasets', 'tensorflow_datasets', 'webdataset'} & set(sys.modules);"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
