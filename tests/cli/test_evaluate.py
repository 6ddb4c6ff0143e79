"""Tests `leon evaluate`: the metrics of `leon_jax.evaluate.measurements`, averaged over groups."""

import json

import numpy as np
import pytest

from leon_jax.cli import main
from leon_jax.evaluate import meanings, measurements, perceptual_match
from leon_jax.leon import Leon
from leon_jax.retrieval.prepared_folder import PreparedFolder
from leon_jax.tokenizers.image import fit_image
from leon_jax.train import perceptual_weights
from tests import tiny


@pytest.fixture
def run(capsys):
    model, prepared = tiny.folders()

    def command(*arguments: str) -> tuple[int, str, str]:
        code = main.run(["evaluate", f"--model={model}", f"--index={prepared}", *arguments])
        output = capsys.readouterr()
        return code, output.out, output.err

    return command


def test_matching_metrics_are_averaged_over_the_groups(run, tmp_path):
    code, stdout, stderr = run(
        "--candidates=2", "--groups=2", "--caption_docs=0", "--caption_docs=1", "--top_p=1",
        f"--out={tmp_path / 'report'}",
    )  # fmt: skip
    assert code == 0
    metrics = json.loads(stdout)
    assert json.loads((tmp_path / "report" / "metrics.json").read_text()) == metrics
    page = (tmp_path / "report" / "index.html").read_text()
    assert "Generated, 2 documents" in page and "<h2>Reconstructions" in page
    stderr, report = stderr.rsplit("report: ", 1)
    assert report.strip() == str(tmp_path / "report" / "index.html")
    # One line for each metric, with its unit and definition.
    lines = dict(line.split(": ", 1) for line in stderr.splitlines())
    assert list(lines) == list(metrics)
    assert all(meanings.MEANINGS[name] in line for name, line in lines.items())
    assert lines["tokenizer_psnr_db"].startswith(f"{metrics['tokenizer_psnr_db']:.2f} dB (")
    assert lines["real_match_share"].startswith(f"{100 * metrics['real_match_share']:.1f} % (")
    assert lines["image_perplexity_by_documents"].startswith("0 documents: ")
    leon, prepared = Leon.load(*tiny.folders()), tiny.folders()[1]
    source = PreparedFolder(prepared).records("unseen_design")
    groups = [[source[0], source[1]], [source[2], source[3]]]
    assert metrics["tokenizer_psnr_db"] == pytest.approx(
        measurements.reconstruct(leon, [*groups[0], *groups[1]]).psnr_db
    )
    assert set(metrics["image_perplexity_by_documents"]) == {"0", "1", "2"}
    assert metrics["real_match_share"] == np.mean(
        [measurements.real_match(leon, group) for group in groups]
    )
    for docs in (0, 1):
        ranks = [measurements.caption_ranks(leon, group, docs)[0] for group in groups]
        assert metrics["caption_rank1_share_by_documents"][str(docs)] == np.mean(
            np.concatenate(ranks) == 0
        )
    described = groups[0] + groups[1]
    exact, right = measurements.caption_matches(measurements.captions(leon, described), described)
    assert metrics["caption_exact_share"] == exact.mean()
    lines = (tmp_path / "report" / "captions.jsonl").read_text().splitlines()
    written = [json.loads(line) for line in lines]
    assert [line["caption"] for line in written] == [document.text for document in described]
    assert [line["generated"] for line in written] == measurements.captions(leon, described)
    assert [line["concept"] for line in written] == right.tolist()
    assert "<th>Generated caption</th>" in page
    assert metrics["caption_concept_share"] == right.mean()
    generations = [
        measurements.generate(leon, group, 2, guidance=3.0, top_p=1.0) for group in groups
    ]
    assert metrics["prompt_match_share_by_documents"]["2"] == np.mean(
        [measurements.prompt_match(leon, images) for images in generations]
    )
    weights = perceptual_weights.load("vgg16")

    def lpips_share(images: list[list[np.ndarray]]) -> float:
        real = [[document.pixels for document in group] for group in groups]
        pairs = zip(images, real, strict=True)
        return np.mean([perceptual_match.match_share(*pair, weights) for pair in pairs])

    pixels = [[np.asarray(one.image) for one in images] for images in generations]
    assert metrics["lpips_match_share_by_documents"]["2"] == lpips_share(pixels)
    _, decoded = measurements.reconstruct(leon, [*groups[0], *groups[1]]).images
    assert metrics["lpips_reconstruction_share"] == lpips_share([decoded[:2], decoded[2:]])
    # The nearest retrieved document, which stands next to the prompt, is what a copier returns.
    nearest = [
        [
            fit_image(one.retrieved[-1].pixels, leon.model.image_tokenizer.resolution)
            for one in images
        ]
        for images in generations
    ]
    assert metrics["lpips_copy_share"] == lpips_share(nearest)


def test_a_report_that_cannot_be_written_is_refused_at_the_start(run, tmp_path):
    (tmp_path / "file").write_text("")
    code, stdout, message = run("--candidates=2", f"--out={tmp_path / 'file' / 'report'}")
    assert code == 2 and not stdout and "is not a folder" in message


@pytest.mark.parametrize("flag", ["--candidates=1", "--candidates=5", "--groups=0", "--groups=3"])
def test_a_group_size_or_count_out_of_range_is_refused(run, flag):
    code, stdout, message = run("--candidates=2", flag)
    assert code == 2 and not stdout
    assert flag.split("=")[0] in message and message.count("\n") == 1


def test_an_unknown_source_is_refused_with_those_of_the_split(run):
    code, stdout, message = run("--candidates=2", "--source=cats")
    assert code == 2 and not stdout
    assert "--source is 'cats'; the split unseen_design has documents of Twemoji" in message
