"""`leon evaluate`: numbers averaged over groups of documents."""

import json

import numpy as np
import pytest

from leon_jax.cli import main
from leon_jax.evaluate import meanings, measurements
from leon_jax.leon import Leon
from leon_jax.retrieval.prepared_folder import PreparedFolder
from tests import tiny


@pytest.fixture
def run(capsys):
    checkpoint, prepared = tiny.folders()

    def command(*arguments: str) -> tuple[int, str, str]:
        code = main.run(
            ["evaluate", f"--checkpoint={checkpoint}", f"--index={prepared}", *arguments]
        )
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return command


def test_what_is_ranked_and_drawn_is_averaged_over_the_groups(run):
    code, printed, said = run(
        "--candidates=2", "--groups=2", "--caption_docs=0", "--caption_docs=1", "--top_p=1"
    )
    assert code == 0
    metrics = json.loads(printed)
    # A line for each, with the unit and the meaning.
    lines = dict(line.split(": ", 1) for line in said.splitlines())
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
    drawn = [measurements.draw(leon, group, 2, guidance=3.0, top_p=1.0) for group in groups]
    assert metrics["prompt_match_share_by_documents"]["2"] == np.mean(
        [measurements.prompt_match(leon, d) for d in drawn]
    )


@pytest.mark.parametrize("wrong", ["--candidates=1", "--candidates=5", "--groups=0", "--groups=3"])
def test_groups_that_the_split_cannot_fill_are_named(run, wrong):
    code, printed, message = run("--candidates=2", wrong)
    assert code == 2 and not printed
    assert wrong.split("=")[0] in message and message.count("\n") == 1
