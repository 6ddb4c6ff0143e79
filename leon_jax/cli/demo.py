"""Runs everything once on real data and leaves a page to look at.

Makes the emoji data set and its index, generates images for held-out prompts and writes captions
for held-out images with the model of the package, trains the decoder on for a minute in two starts,
and writes OUT/index.html and OUT/metrics.json. Takes about six minutes on two CPU cores.
"""

import json
import os
import pathlib
import subprocess
import sys
import time

from absl import flags

from leon_jax.config import UserError

_OUT = flags.DEFINE_string("out", "out/demo", "Where the page goes.")
_DATA = flags.DEFINE_string("data", "data", "Where the dataset and its index go.")
_MODEL = flags.DEFINE_string("model", None, "A model folder; the shipped one by default.")

# Documents of `unseen_design` that the numbers are measured on, and rows shown on the page.
_MEASURED, _SHOWN = 50, 16
_GUIDANCE, _TOP_P = 3.0, 0.9
_FIRST_STEPS, _ALL_STEPS = 60, 120

_CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "emoji" / "decoder.py"


def main(argv: list[str]) -> None:
    """Runs `leon demo`.

    Raises:
      UserError: weights or packages are missing, or the folders cannot be written.
    """
    del argv
    started = time.monotonic()
    if not _CONFIG.is_file():
        raise UserError(f"the demo trains with {_CONFIG}, which a clone of the project has")
    out, data = pathlib.Path(_OUT.value), pathlib.Path(_DATA.value)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {out} cannot be made: {error.strerror}") from error

    from leon_jax.datasets import demo as dataset
    from leon_jax.evaluate import demo_page, meanings, measurements
    from leon_jax.generate.retriever import model_files
    from leon_jax.leon import Leon
    from leon_jax.model_folder import shipped_folder
    from leon_jax.retrieval.prepared_folder import PreparedFolder

    model = pathlib.Path(_MODEL.value) if _MODEL.value else shipped_folder()
    prepared = data / "emoji_prepared"
    _say("1/5 the dataset: drawing 7,900 emoji")
    dataset.make_dataset(data / "emoji")
    _say("2/5 picture codes, embeddings, index and neighbours")
    dataset.prepare_documents(data / "emoji", prepared, **model_files(model))

    _say("3/5 pictures and captions for what training never saw")
    leon = Leon.load(_MODEL.value, prepared)
    held_out = PreparedFolder(prepared).records("unseen_design")
    documents = [held_out[i] for i in range(_MEASURED)]
    rebuilt = measurements.reconstruct(leon, [held_out[i] for i in range(len(held_out))])
    drawn = {
        n: measurements.draw(leon, documents, n, guidance=_GUIDANCE, top_p=_TOP_P) for n in (0, 2)
    }
    shown = documents[:_SHOWN]
    written = [
        (leon.caption(document.pixels).text, leon.caption(document.pixels, num_docs=2).text)
        for document in shown
    ]
    _say("4/5 numbers")
    ranks = {n: measurements.caption_ranks(leon, documents, n)[0] for n in (0, 2)}
    metrics: dict[str, meanings.Number] = {
        "candidates": _MEASURED,
        "tokenizer_psnr_db": rebuilt.psnr_db,
        "codes_used_share": rebuilt.codes_used,
        "image_perplexity_by_documents": {
            str(n): measurements.image_perplexity(leon, documents, n) for n in (0, 1, 2)
        },
        "caption_rank1_share_by_documents": {str(n): float((ranks[n] == 0).mean()) for n in ranks},
        "prompt_match_share_by_documents": {
            str(n): measurements.prompt_match(leon, drawn[n]) for n in drawn
        },
        "real_match_share": measurements.real_match(leon, documents),
    }
    pictures = out / "pictures"
    pictures.mkdir(exist_ok=True)
    for number, generation in enumerate(drawn[2]):
        generation.save(pictures / f"{number:02d}.png")

    _say("5/5 a minute more of training, in two starts")
    losses = _train(out / "training", prepared, model)

    metrics["seconds"] = time.monotonic() - started
    sections = [
        (
            "What this is",
            f"<p>Everything here was made by <code>{leon.name}</code> on this machine. The prompts "
            "and pictures are Twemoji designs that were held out of all training; the same "
            "concepts were seen as OpenMoji designs only. Images are "
            f"{leon.model.image_tokenizer.resolution} pixels a side, shown larger. OpenMoji is CC "
            "BY-SA 4.0 by the OpenMoji project; Twemoji is CC BY 4.0 by Twitter, Inc and other "
            "contributors.</p>",
        ),
        ("Numbers", demo_page.numbers(metrics)),
        (
            "Pictures for held-out prompts",
            demo_page.drawings(shown, drawn[0][:_SHOWN], drawn[2][:_SHOWN]),
        ),
        ("Captions for held-out pictures", demo_page.captions(shown, written)),
        (
            "What the image tokenizer keeps",
            "<p>Held-out pictures above, the same after encoding and decoding below.</p>"
            + "<br>".join(
                "".join(demo_page.picture(pixels, "held-out picture") for pixels in row[:10])
                for row in rebuilt.pictures
            ),
        ),
        (
            "Training goes on",
            f"<p>The shipped decoder trained for {_ALL_STEPS} more steps, stopped after step "
            f"{_FIRST_STEPS} and resumed from its own checkpoint.</p>"
            + demo_page.curve(losses, _FIRST_STEPS, "training loss, nats a token"),
        ),
    ]
    _write(out / "index.html", demo_page.page("leon_jax: the demo", sections, metrics))
    _write(out / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    print(json.dumps(metrics, indent=1))
    _say(f"done: open {out / 'index.html'}")


def _train(workdir: pathlib.Path, prepared: pathlib.Path, model: pathlib.Path) -> list:
    """Trains the shipped decoder a little in two processes; returns (step, loss) of each step."""
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
            # The demo's folder holds every picture once, as it is.
            "--config.data.variants=1",
            "--config.loop.log_every=1", "--config.optimizer.learning_rate=1e-4",
            "--config.optimizer.warmup_steps=0", "--config.optimizer.schedule=constant",
            f"--config.steps={steps}",
        ]  # fmt: skip
        if subprocess.run(command, check=False).returncode:
            raise UserError(f"training stopped with an error; its command was {' '.join(command)}")
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [(line["step"], line["loss"]) for line in map(json.loads, lines)]


def _write(path: pathlib.Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _say(message: str) -> None:
    print(f"[demo] {message}", file=sys.stderr, flush=True)
