"""The examples of docs/bring_data.md create data that is prepared without rejects."""

import re
from pathlib import Path

import pytest

from leon_jax.cli import main
from leon_jax.data.document_folder import DocumentFolder
from leon_jax.data.sources.open import open_source
from leon_jax.data.sources.raw_record import RawRecord, SourceConfig

PAGE = Path(__file__).resolve().parents[3] / "docs" / "bring_data.md"
# A block of Python, and the command that prepares its data.
EXAMPLES = re.findall(
    r"```python\n((?:(?!```).)*)```\n\n```bash\nleon (prepare --source=(\w+):\S+ [^\n]*)\n",
    PAGE.read_text(),
    re.S,
)


def test_every_format_has_an_example():
    kinds = [kind for _, _, kind in EXAMPLES]
    assert kinds == ["folder", "jsonl", "webdataset", "parquet", "huggingface"]


@pytest.mark.parametrize(
    ("program", "command", "kind"), EXAMPLES, ids=[kind for _, _, kind in EXAMPLES]
)
def test_an_example_is_prepared(program, command, kind, tmp_path, monkeypatch):
    """Creates and prepares data as the page shows."""
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    assert main.run(command.split()) == 0
    (out,) = (tmp_path / "data").glob("[!.]*")
    documents = DocumentFolder(out)
    assert documents.splits["train"] >= 2
    assert documents.manifest["counts"]["train"]["rejected"] == {}
    for document in documents.records():
        assert "cat" in document.text and document.provenance.licence.startswith("CC")


@pytest.mark.parametrize("shape", re.findall(r"^\| `(\{.*\})` \|", PAGE.read_text(), re.M))
def test_a_record_form_of_the_table_is_read(shape, tmp_path):
    (tmp_path / "a.jsonl").write_text(shape)
    for name in re.findall(r"\w+\.png", shape):
        (tmp_path / name).write_bytes(b"picture")
    [raw] = open_source(SourceConfig("jsonl", str(tmp_path))).read("a.jsonl:1")
    assert isinstance(raw, RawRecord)
