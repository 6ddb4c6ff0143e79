"""A source of one file continues within the file after Ctrl-C."""

import json

import numpy as np
import PIL.Image
import pytest

from leon_jax.data.sources.jsonl import Jsonl
from leon_jax.data.sources.raw_record import SourceConfig
from leon_jax.prepare import prepare as preparing
from leon_jax.retrieval.prepared_folder import PreparedFolder
from tests import tiny
from tests.prepare.folders import NEVER_NEAR, files_of


@pytest.mark.parametrize("kind", ["jsonl", "folder"])
def test_finished_ranges_of_a_file_are_not_read_again(kind, checkpoint, out, tmp_path, monkeypatch):
    folder = tmp_path / "cats"
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for n in range(14):
        pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{n:02}.png")
        lines.append({"file_name": f"{n:02}.png", "text": f"cat {n}"})
    name = "cats.jsonl" if kind == "jsonl" else "metadata.jsonl"
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = folder / name if kind == "jsonl" else folder
    source = SourceConfig(kind, str(path), licence="CC0-1.0", shard_size=4)
    config, _ = tiny.preparation(checkpoint, {}, sources=(source,), selection=NEVER_NEAR)

    def shards_read(stop=None):
        """Prepares with Ctrl-C in the middle of shard number `stop`; returns the shards read."""
        opened = preparing.open_source(source)
        read, names = type(opened).read, []

        def interrupted(self, shard):
            names.append(shard)
            for number, record in enumerate(read(self, shard)):
                if len(names) == stop and number == 2:
                    raise KeyboardInterrupt
                yield record

        with monkeypatch.context() as patch:
            patch.setattr(type(opened), "read", interrupted)
            preparing.prepare(config, out, progress=False)
        return names

    stem = "cats.jsonl" if kind == "jsonl" else "images"
    with pytest.raises(KeyboardInterrupt):
        shards_read(stop=3)
    assert not out.exists()
    assert shards_read() == [f"{stem}:9", f"{stem}:13"], "the first eight records were finished"
    resumed = files_of(out)
    preparing.prepare(config, tmp_path / "unbroken", progress=False)
    assert files_of(tmp_path / "unbroken") == resumed
    texts = [document.text for document in PreparedFolder(out).records()]
    assert texts == [line["text"] for line in lines]


def test_a_file_of_a_thousand_records_has_several_ranges(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"parts": [{"text": "a"}]}\n' * 1000)
    source = Jsonl(SourceConfig("jsonl", str(tmp_path / "a.jsonl")))
    assert source.shards() == [f"a.jsonl:{line}" for line in (1, 257, 513, 769)]
