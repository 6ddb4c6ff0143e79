"""Runs every step once on real data and writes an HTML report.

1. Renders the emoji dataset and prepares it for retrieval.
2. Generates images for held-out prompts and captions for held-out images with the shipped model.
3. Evaluates the model.
4. Trains the decoder for one more minute, stops it, and resumes it from its checkpoint.

Writes OUT/index.html and OUT/metrics.json. Takes about six minutes on two CPU cores.
"""

import json
import pathlib
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from absl import flags

from leon_jax.config import UserError

if TYPE_CHECKING:
    from leon_jax.documents import Document
    from leon_jax.leon import GeneratedImage, Leon
    from leon_jax.retrieval.prepared_folder import PreparedFolder

_OUT = flags.DEFINE_string("out", "out/demo", "The folder of the report.")
_DATA = flags.DEFINE_string("data", "data", "The folder for the dataset and its prepared folder.")
_MODEL = flags.DEFINE_string(
    "model", None, "A model folder, or a .tar of one; by default the shipped model."
)

# Documents of `unseen_design` that the metrics use, and rows in the report.
_MEASURED, _SHOWN = 50, 16
_GUIDANCE, _TOP_P = 3.0, 0.9
_FIRST_STEPS, _ALL_STEPS = 60, 120

# Images in the first row of the report.
_OPENING = 8

_LIMITS = """<ul>
<li>It draws emoji, one to an image. It knows no photographs and no other scenes.</li>
<li>It draws few concepts well that it was not trained on and cannot retrieve.</li>
<li>Small details blur: faces in a crowd, letters, the pattern of a flag.</li>
<li>It gives images the captions of emoji. It does not answer questions, and it does not follow
instructions to edit an image.</li>
</ul>"""

_CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "emoji" / "decoder.py"


def main(argv: list[str]) -> None:
    """Runs `leon demo`.

    Raises:
      UserError: weights or packages are missing, or the folders cannot be written.
    """
    del argv
    start_time = time.monotonic()
    if not _CONFIG.is_file():
        raise UserError(f"leon demo needs {_CONFIG}; run it in a clone of the repository")
    out, data = pathlib.Path(_OUT.value), pathlib.Path(_DATA.value)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {out} cannot be created: {error.strerror}") from error

    import numpy as np

    from leon_jax.datasets import demo as dataset
    from leon_jax.evaluate import meanings, measurements, report_page
    from leon_jax.generate.retriever import model_files
    from leon_jax.leon import Leon
    from leon_jax.model_folder import ModelFolder
    from leon_jax.retrieval.prepared_folder import PreparedFolder

    model = ModelFolder.open(_MODEL.value).path
    prepared = data / "emoji_prepared"
    _log("1/5 rendering the dataset of 7,900 emoji")
    dataset.make_dataset(data / "emoji")
    _log("2/5 computing image codes, embeddings, index and neighbours")
    dataset.prepare_documents(data / "emoji", prepared, **model_files(model))

    _log("3/5 generating images and captions for held-out documents")
    leon = Leon.load(model, prepared)
    held_out = PreparedFolder(prepared).records("unseen_design")
    documents = [held_out[i] for i in range(_MEASURED)]
    reconstruction = measurements.reconstruct(leon, [held_out[i] for i in range(len(held_out))])
    generations = {
        n: measurements.generate(leon, documents, n, guidance=_GUIDANCE, top_p=_TOP_P)
        for n in (0, 2)
    }
    shown = documents[:_SHOWN]
    captions = [
        (leon.caption(document.pixels).text, leon.caption(document.pixels, num_docs=2).text)
        for document in shown
    ]
    _log("4/5 evaluating")
    ranks = {n: measurements.caption_ranks(leon, documents, n)[0] for n in (0, 2)}
    metrics: dict[str, meanings.Number] = {
        "candidates": _MEASURED,
        "tokenizer_psnr_db": reconstruction.psnr_db,
        "codes_used_share": reconstruction.codes_used,
        "image_perplexity_by_documents": {
            str(n): float(np.exp(measurements.image_losses(leon, documents, n).mean()))
            for n in (0, 1, 2)
        },
        "caption_rank1_share_by_documents": {str(n): float((ranks[n] == 0).mean()) for n in ranks},
        "prompt_match_share_by_documents": {
            str(n): measurements.prompt_match(leon, images) for n, images in generations.items()
        },
        "real_match_share": measurements.real_match(leon, documents),
        **_judge(leon, PreparedFolder(prepared), documents, generations),
    }
    images_folder = out / "pictures"
    images_folder.mkdir(exist_ok=True)
    for number, generation in enumerate(generations[2]):
        generation.save(images_folder / f"{number:02d}.png")

    _log("5/5 training for one more minute, with one restart")
    losses = _train(out / "training", prepared, model)

    metrics["seconds"] = time.monotonic() - start_time
    sections = [
        ("", report_page.gallery(generations[2][:_OPENING])),
        (
            "About this report",
            f"<p>The model <code>{leon.name}</code> generated everything here on this machine. "
            f"Above are its images for the first {_OPENING} prompts of the held-out designs; none "
            "was chosen. The prompts and images are Twemoji designs that were held out of "
            "training. The model read two retrieved documents for each, and the same concept in "
            "another design may be one of them. Images are "
            f"{leon.model.image_tokenizer.resolution} pixels a side, shown larger. OpenMoji is CC "
            "BY-SA 4.0 by the OpenMoji project; Twemoji is CC BY 4.0 by Twitter, Inc and other "
            "contributors.</p>",
        ),
        ("What the model cannot do", _LIMITS),
        ("Metrics", report_page.metrics_table(metrics)),
        (
            "Images for held-out prompts",
            report_page.generated_images(shown, generations[0][:_SHOWN], generations[2][:_SHOWN]),
        ),
        ("Captions for held-out images", report_page.captions(shown, captions)),
        (
            "Reconstructions of the image tokenizer",
            report_page.reconstructions(reconstruction.images),
        ),
        (
            "Continued training",
            f"<p>The shipped decoder trained for {_ALL_STEPS} more steps. It stopped after step "
            f"{_FIRST_STEPS} and resumed from its own checkpoint.</p>"
            + report_page.curve(losses, _FIRST_STEPS, "training loss, nats per token"),
        ),
    ]
    report_page.write(out, "leon_jax: the demo", sections, metrics)
    print(json.dumps(metrics, indent=1))
    _log(f"finished; open {out / 'index.html'}")


def _judge(
    leon: "Leon",
    prepared: "PreparedFolder",
    unseen: list["Document"],
    generations: dict[int, list["GeneratedImage"]],
) -> dict[str, dict[str, float]]:
    """Returns the metrics of LPIPS, which had no part in training.

    Args:
      leon: the model.
      prepared: the prepared folder of the emoji.
      unseen: held-out documents.
      generations: their images, by the number of retrieved documents.
    """
    import numpy as np

    from leon_jax.datasets import demo as dataset
    from leon_jax.evaluate import measurements, perceptual_match
    from leon_jax.train import perceptual_weights

    weights = perceptual_weights.load("vgg16")
    seen = dataset.seen_documents(prepared.records("train"), _MEASURED)
    drawn = measurements.generate(leon, seen, 2, guidance=_GUIDANCE, top_p=_TOP_P)

    def share(images: list, documents: list["Document"]) -> float:
        real = [document.pixels for document in documents]
        return perceptual_match.match_share([np.asarray(i) for i in images], real, weights)

    judge = {"seen_2": share([one.image for one in drawn], seen)}
    for docs in (2, 0):
        judge[f"unseen_{docs}"] = share([one.image for one in generations[docs]], unseen)
    copied = {
        name: share(measurements.copies(leon, documents), documents)
        for name, documents in (("seen", seen), ("unseen", unseen))
    }
    return {"judge": judge, "judge_copy": copied}


def _train(workdir: pathlib.Path, prepared: pathlib.Path, model: pathlib.Path) -> list:
    """Trains the shipped decoder in two processes and returns (step, loss) of each step."""
    import shutil

    shutil.rmtree(workdir, ignore_errors=True)
    for steps in (_FIRST_STEPS, _ALL_STEPS):
        command = [
            sys.executable, "-m", "leon_jax.cli.main", "train",
            f"--config={_CONFIG}", f"--workdir={workdir}",
            f"--config.data.folder={prepared}",
            f"--config.data.text={model / 'text.json'}",
            f"--config.samples.image={model / 'tokenizer.safetensors'}",
            f"--config.loop.init_from={model / 'decoder.safetensors'}",
            # The demo's folder holds one variant of each image, the plain one.
            "--config.data.variants=1",
            "--config.loop.log_every=1", "--config.loop.eval_every=0",
            "--config.optimizer.learning_rate=1e-4",
            "--config.optimizer.warmup_steps=0", "--config.optimizer.schedule=constant",
            "--config.optimizer.decay_steps=0",
            f"--config.steps={steps}",
        ]  # fmt: skip
        if subprocess.run(command, check=False).returncode:
            raise UserError(f"training stopped with an error; its command was {' '.join(command)}")
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [(line["step"], line["loss"]) for line in map(json.loads, lines)]


def _log(message: str) -> None:
    print(f"[demo] {message}", file=sys.stderr, flush=True)
