"""Tests `leon report`: reading runs, also damaged ones, and what the page shows."""

import json
import pathlib
import re

import numpy as np
import PIL.Image
import pytest

from leon_jax.cli import main
from leon_jax.config import UserError
from leon_jax.report import charts, runs


def write_run(folder: pathlib.Path, rate: float = 0.1, steps: int = 100, end: str = "") -> None:
    """Writes the files of a run that logged every tenth step up to step 60."""
    folder.mkdir()
    config = {"kind": "decoder", "steps": steps, "optimizer": {"learning_rate": rate, "eps": 1e-8}}
    (folder / "config.json").write_text(json.dumps(config))
    lines = [
        {"step": step, "loss": 5 - step * rate, "goodput": 0.5, "heldout/loss": 6 - step * rate}
        for step in range(10, 70, 10)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + end)
    goodput = {"seconds": {"step": 30.0, "compile": 10.0}, "step": 60, "time": 0}
    (folder / "goodput.json").write_text(json.dumps(goodput))
    (folder / "samples").mkdir()
    for step in range(10, 70, 10):
        pixels = np.full((8, 16, 3), step, np.uint8)
        PIL.Image.fromarray(pixels).save(folder / "samples" / f"samples_{step:07d}.png")


def report(*arguments: str) -> int:
    return main.run(("report", *arguments))


def polylines(page: str, title: str) -> list[list[tuple[float, float]]]:
    """Returns the points of the lines of a chart."""
    chart = page.split(f'aria-label="{title}')[1].split("</svg>")[0]
    texts = re.findall(r'<polyline points="([^"]+)"', chart)
    return [[tuple(map(float, pair.split(","))) for pair in text.split()] for text in texts]


def test_the_page_shows_two_runs_their_curves_and_their_differences(tmp_path):
    write_run(tmp_path / "one", 0.01)
    write_run(tmp_path / "other", 0.05)
    out = tmp_path / "page"
    assert report(str(tmp_path / "one"), str(tmp_path / "other"), f"--out={out}") == 0
    page = (out / "index.html").read_text()
    one, other = polylines(page, "loss, mean")
    assert len(one) == len(other) == 6
    # Steps grow to the right, and a lower loss is lower on the page.
    assert [x for x, _ in one] == sorted(x for x, _ in one)
    assert one[-1][1] < other[-1][1] and one[0][1] < one[-1][1]
    (row,) = re.findall(r"<tr><td><code>optimizer\.[^/]*</code>.*?</tr>", page)
    assert "learning_rate" in row and "0.01" in row and "0.05" in row
    assert "optimizer.eps" not in page, "it is the same in both"
    assert page.count("<img ") == 12 and "75.0 %" in page
    assert "http" not in page.replace("http-equiv", ""), "the page needs no network"


def test_a_run_that_goes_on_with_a_damaged_last_line_is_shown(tmp_path):
    write_run(tmp_path / "run", end='{"step": 70, "lo')
    (tmp_path / "run" / "samples" / "samples_0000070.png").write_bytes(b"\x89PNG cut")
    (tmp_path / "run" / "goodput.json").write_text('{"sec')
    out = tmp_path / "page"
    assert report(str(tmp_path / "run"), f"--out={out}") == 0
    page = (out / "index.html").read_text()
    assert "60 of 100" in page and "before this page" in page
    assert "1 line of its logs is damaged and left out" in page
    assert page.count("<img ") == 6 and "Differences" not in page


def test_bytes_that_are_no_text_and_repeated_steps_are_read(tmp_path):
    """A run that was killed and went on may have logged a step twice."""
    write_run(tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 60, "loss": 1.5}\n\xff\xfe\x00\n[1]\n{"loss": 2}\n')
    (run,) = runs.read([tmp_path / "run"])
    assert [line["step"] for line in run.lines] == [10, 20, 30, 40, 50, 60]
    assert run.lines[-1]["loss"] == 1.5 and run.damaged == 3


def test_the_run_of_a_text_tokenizer_has_no_metrics(tmp_path):
    (tmp_path / "text" / "export").mkdir(parents=True)
    (tmp_path / "text" / "export" / "text.json").write_text("{}")
    assert report(str(tmp_path / "text"), f"--out={tmp_path / 'page'}") == 0
    assert "finished" in (tmp_path / "page" / "index.html").read_text()


def test_what_is_no_run_is_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "run")
    out = f"--out={tmp_path / 'page'}"
    for arguments, message in (
        ([out], "name at least one workdir"),
        ([str(tmp_path / "run")], "--out is missing"),
        ([str(tmp_path / "none"), out], "there is no folder"),
        ([str(tmp_path / "empty"), out], "holds no run: it has no config.json"),
        ([str(tmp_path / "run"), str(tmp_path / "run"), out], "is named twice"),
    ):
        assert report(*arguments) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "page").exists()
    with pytest.raises(UserError, match="no folder"):
        runs.read([tmp_path / "none"])


def test_names_of_runs_that_would_be_equal_are_their_paths(tmp_path):
    for parent in ("a", "b"):
        (tmp_path / parent).mkdir()
        write_run(tmp_path / parent / "run")
    folders = [tmp_path / parent / "run" for parent in ("a", "b")]
    assert [run.name for run in runs.read(folders)] == [str(folder) for folder in folders]


def test_ticks_are_round_numbers_within_the_range():
    assert charts.ticks(0, 200) == [0, 50, 100, 150, 200]
    assert charts.ticks(0.93, 1.41) == pytest.approx([1.0, 1.1, 1.2, 1.3, 1.4])
    assert charts.ticks(3, 3) == [3]


def test_many_points_are_averaged_and_those_that_are_no_numbers_are_left_out():
    points = [(float(x), float("nan") if x == 5 else 2.0 * x) for x in range(1001)]
    thin = charts.thinned(points, 100)
    assert thin.shape == (100, 2)
    np.testing.assert_allclose(thin[:, 1], 2 * thin[:, 0])
    assert charts.line_chart("t", [("a", "#000", [(1.0, float("inf"))])]) == ""


def test_a_few_values_far_above_the_others_do_not_flatten_the_curve():
    points = [(float(x), 1000.0 if x == 0 else 2.0 + x / 100) for x in range(100)]
    chart = charts.line_chart("loss", [("a", "#000", points)])
    (line,) = polylines(chart, "loss")
    heights = [y for _, y in line[1:]]
    assert "cut above" in chart and max(heights) - min(heights) > 100
