"""Tests that the benchmark of the index runs and that all sides find the same neighbours."""

import re
import subprocess
import sys

import pytest

from benchmarks.turns import ROOT


@pytest.mark.slow
def test_the_page_has_the_measured_numbers(tmp_path):
    pytest.importorskip("faiss")
    result = subprocess.run(
        [
            sys.executable, "-m", "benchmarks.mining", "--rows=2000", "--dimensions=32",
            "--queries=50", "--truth=50", "--growth", "1", "2", "--growth_queries=50",
            "--rounds=1", "--noise=1", "--topology=", f"--out={tmp_path / 'mining.md'}",
            f"--folder={tmp_path}",
        ],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["mining.md"]
    page = (tmp_path / "mining.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    recalls = {row[0]: float(row[4]) for row in rows if re.match(r"(ours|FAISS)", row[0])}
    assert recalls["ours, exact"] == recalls["FAISS `IndexFlatIP`"] == 1
    assert 0.9 < recalls["ours, approximate"] <= 1
    assert [row[0] for row in rows[-2:]] == ["2,000", "4,000"]
