"""Compares grids and codebooks of the image tokenizer, each with a decoder, at equal cost.

    leon prepare --config=configs/emoji/designs.py --out=data/emoji_designs
    taskset -c 0 python -m benchmarks.image_grids --documents=data/emoji_designs

Trains the tokenizer of configs/emoji/tokenizer.py and the decoder of configs/emoji/decoder.py for
each row of the table. The steps are chosen so that each takes about the same time on one core.
Texts and neighbours come from the shipped model. Run it again to resume an interrupted run. --cells
names some of the rows, so that two processes can share the work. Writes docs/image_grids.md and its
image when every row is measured.
"""

import dataclasses
import json
import pathlib
import runpy
from collections.abc import Callable

import jax
import numpy as np
import PIL.Image
import PIL.ImageDraw
from absl import app, flags
from jaxtyping import UInt8

from benchmarks.short_runs import held_out, leon, train
from leon_jax import sharding
from leon_jax.data.document_folder import DocumentFolder
from leon_jax.data.scenes import compose
from leon_jax.evaluate import perceptual_match
from leon_jax.model_folder import shipped_folder
from leon_jax.tokenizers.image import ImageTokenizer, fit_image, normalize, to_pixels
from leon_jax.tokenizers.text import TextTokenizer
from leon_jax.train import perceptual_weights

_DOCUMENTS = flags.DEFINE_string("documents", "data/emoji_designs", "The documents folder.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/image_grids", "The folder of all results.")
_CELLS = flags.DEFINE_list("cells", [], "Cells to measure; by default all.")
_PAGE = flags.DEFINE_string("page", "docs/image_grids.md", "The page to write.")
_IMAGE = flags.DEFINE_string("image", "docs/images/image_grids.png", "The image to write.")

CONFIGS = pathlib.Path("configs/emoji")
SPLIT = "unseen_design"
SHOWN = 24  # images in the picture


@dataclasses.dataclass(frozen=True)
class Cell:
    """One row of the table.

    Attributes:
      grid: side of the grid of codes.
      codebook: a codebook of configs/emoji/tokenizer.py.
      codes: entries of the codebook.
      pixel_patch: side of the squares of pixels that the tokenizer's last layer makes.
      tokenizer_steps: training steps of the tokenizer.
      decoder_steps: training steps of the decoder; 0: no decoder.
    """

    grid: int
    codebook: str
    codes: int
    pixel_patch: int
    tokenizer_steps: int
    decoder_steps: int


CELLS = {
    "8-plain": Cell(8, "plain", 1024, 1, 850, 900),
    "8-unit": Cell(8, "unit", 1024, 1, 850, 900),
    "8-unit-squares": Cell(8, "unit", 1024, 2, 1250, 0),
    "8-unit-4096-squares": Cell(8, "unit", 4096, 2, 1250, 900),
    "16-plain": Cell(16, "plain", 1024, 1, 850, 300),
    "16-unit": Cell(16, "unit", 1024, 1, 850, 300),
    "16-unit-squares": Cell(16, "unit", 1024, 2, 1400, 0),
}


def main(argv: list[str]) -> None:
    """Runs the missing parts, then writes the page if every cell is measured."""
    del argv
    work = pathlib.Path(_WORKDIR.value).absolute()
    with jax.set_mesh(sharding.make_mesh()):
        for name in _CELLS.value or CELLS:
            measure(CELLS[name], work / name)
    paths = {name: work / name / "result.json" for name in CELLS}
    if all(path.exists() for path in paths.values()):
        results = {name: json.loads(path.read_text()) for name, path in paths.items()}
        write_page(results, work)


def measure(cell: Cell, folder: pathlib.Path) -> None:
    """Trains the models of a cell and writes result.json, unless it is there."""
    if (folder / "result.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = stage("tokenizer")(cell.grid, cell.codebook)
    tokenizer["model"] |= {
        "channels": 16, "codes": cell.codes, "pixel_patch": cell.pixel_patch,
    }  # fmt: skip
    tokenizer["losses"]["adversarial_start"] = cell.tokenizer_steps
    tokenizer["data"] = {"folder": _DOCUMENTS.value}
    tokenizer["loop"] = {"log_every": 50, "save_every": 200, "eval_every": 200}
    train(folder, "tokenizer", tokenizer, cell.tokenizer_steps)
    result = measure_tokenizer(folder / "tokenizer" / "export" / "tokenizer.safetensors")
    if cell.decoder_steps:
        result |= measure_decoder(cell, folder)
    result["core_seconds"] = json.loads((folder / "core_seconds.json").read_text())
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")


def stage(name: str) -> Callable[..., dict]:
    """Returns the function that makes the configuration of a stage of the shipped model."""
    return runpy.run_path(str(CONFIGS / f"{name}.py"))["stage"]


def measure_tokenizer(path: pathlib.Path) -> dict[str, float]:
    """Measures a tokenizer on the held-out images and on scenes of them; writes its images."""
    tokenizer = ImageTokenizer.load(path)
    side = tokenizer.resolution
    images = held_out_images(side)
    rng = np.random.default_rng(0)
    scenes = np.stack(
        [compose(images[rng.choice(len(images), 3)], side, rng) for _ in range(len(images))]
    )
    codes = tokenizer.encode(normalize(images))
    decoded = to_pixels(tokenizer.decode(codes))
    decoded_scenes = to_pixels(tokenizer.decode(tokenizer.encode(normalize(scenes))))
    weights = perceptual_weights.load("vgg16")
    lpips = [
        np.diag(perceptual_match.distances(images[part], decoded[part], weights)).mean()
        for part in (slice(start, start + 50) for start in range(0, 200, 50))
    ]
    PIL.Image.fromarray(np.concatenate(decoded[:SHOWN], axis=1)).save(path.parent / "images.png")
    return {
        "psnr_db": psnr(images, decoded),
        "scene_psnr_db": psnr(scenes, decoded_scenes),
        "lpips": float(np.mean(lpips)),
        "codes_used": len(np.unique(codes)) / tokenizer.codes,
    }


def held_out_images(side: int) -> UInt8[np.ndarray, "n side side 3"]:
    """Returns the held-out images, in a random order."""
    records = DocumentFolder(_DOCUMENTS.value).records(SPLIT)
    order = np.random.default_rng(0).permutation(len(records))
    return np.stack([fit_image(records[int(row)].pixels, side) for row in order])


def psnr(images: UInt8[np.ndarray, "n h w 3"], others: UInt8[np.ndarray, "n h w 3"]) -> float:
    """Returns the peak signal-to-noise ratio in dB, the mean over images."""
    errors = np.square(images.astype(np.float64) - others).mean((1, 2, 3))
    return float((10 * np.log10(255**2 / np.maximum(errors, 1e-10))).mean())


def measure_decoder(cell: Cell, folder: pathlib.Path) -> dict:
    """Trains the decoder of a cell and returns what `leon evaluate` measures."""
    shipped, files = shipped_folder(), folder / "tokenizer" / "export" / "tokenizer.safetensors"
    models = {
        "tokenizer": files,
        "encoder": shipped / "encoder.safetensors",
        "text": shipped / "text.json",
    }
    # Folders with the encodings of two cells would need a digest in every command.
    documents = folder / "documents"
    if not documents.exists():
        documents.mkdir()
        for path in pathlib.Path(_DOCUMENTS.value).absolute().glob("*"):
            if path.is_file():
                (documents / path.name).symlink_to(path)
    leon("encode", f"--folder={documents}", *(f"--{name}={path}" for name, path in models.items()))
    text_tokens = TextTokenizer.load(models["text"]).size
    decoder = stage("decoder")(cell.grid)
    text_start = 4 + cell.codes + 2 + decoder["vocabulary"]["sentinels"]
    decoder["vocabulary"] |= {
        "image_codes": cell.codes, "text_start": text_start, "text_tokens": text_tokens,
    }  # fmt: skip
    decoder["model"] |= {"vocab_size": text_start + text_tokens, "layers": 4}
    decoder["data"] |= {"folder": str(documents), "text": str(models["text"])}
    decoder["samples"] |= {"image": str(files)}
    decoder["loop"] = {"log_every": 50, "save_every": 100, "eval_every": 100}
    train(folder, "decoder", decoder, cell.decoder_steps)
    model = folder / "model"
    if not model.exists():
        flags_ = [f"--{name}={path}" for name, path in models.items()]
        leon(
            "export", f"--workdir={folder / 'decoder'}", *flags_, f"--index={documents}",
            f"--selection={shipped / 'selection.json'}", f"--out={model}",
        )  # fmt: skip
    evaluated = leon("evaluate", f"--model={model}", f"--split={SPLIT}", "--groups=2")
    return {"decoder": held_out(folder / "decoder"), "evaluate": json.loads(evaluated)}


def write_page(results: dict[str, dict], work: pathlib.Path) -> None:
    """Writes the page and its image."""
    rows = []
    for name, result in results.items():
        seconds, cell = result["core_seconds"], CELLS[name]
        values = [
            name, cell.grid, f"{cell.codes:,}", cell.tokenizer_steps, f"{result['psnr_db']:.2f}",
            f"{result['scene_psnr_db']:.2f}", f"{result['lpips']:.3f}",
            f"{100 * result['codes_used']:.0f}", seconds["tokenizer"],
        ]  # fmt: skip
        if cell.decoder_steps:
            decoder, evaluated = result["decoder"], result["evaluate"]
            loss = decoder["image_loss_2"] * cell.grid**2
            shares = evaluated["lpips_match_share_by_documents"]
            values += [
                f"{decoder['image_loss_0'] * cell.grid**2:.0f}", f"{loss:.0f}",
                f"{100 * shares['0']:.0f}", f"{100 * shares['2']:.0f}", seconds["decoder"],
            ]  # fmt: skip
        else:
            values += ["-"] * 5
        rows.append("| " + " | ".join(map(str, values)) + " |")
    table = "\n".join((f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|", *rows))
    image_name = pathlib.Path(_IMAGE.value).name
    pathlib.Path(_PAGE.value).write_text(PAGE.format(table=table, image=image_name))
    originals = held_out_images(64)[:SHOWN]
    strips = {"original": np.concatenate(originals, axis=1)}
    for name in results:
        path = work / name / "tokenizer" / "export" / "images.png"
        strips[name] = np.asarray(PIL.Image.open(path))
    label = 150
    image = PIL.Image.new("RGB", (label + strips["original"].shape[1], 64 * len(strips)), "white")
    draw = PIL.ImageDraw.Draw(image)
    for row, (name, strip) in enumerate(strips.items()):
        draw.text((4, 64 * row + 26), name, fill="black", font_size=13)
        image.paste(PIL.Image.fromarray(strip), (label, 64 * row))
    image.save(_IMAGE.value)


HEAD = (
    "row", "grid", "codes", "steps", "PSNR, dB", "of scenes", "LPIPS", "codes used, %",
    "core seconds", "loss, 0 read", "2 read", "match, 0 read, %", "2 read", "core seconds",
)  # fmt: skip

PAGE = """# Grids and codebooks of the image tokenizer

```bash
leon prepare --config=configs/emoji/designs.py --out=data/emoji_designs
python -m benchmarks.image_grids --documents=data/emoji_designs
```

The benchmark trains a tokenizer and a decoder for each row, at 64 px, on the emoji in five designs.
Each training takes about the same time on one core; the columns of core seconds are measured. The
runs are short, so that the numbers are far from those of a long run.

{table}

- *Row*: side of the grid of codes, and the codebook. *plain*: 16 dimensions. *unit*: directions in
  8 dimensions, as in LlamaGen. *squares*: the tokenizer's last layer makes squares of 2x2 pixels.
- *PSNR* and *LPIPS* (VGG16; the loss uses AlexNet): of the held-out images of `unseen_design` after
  the tokenizer (LPIPS: of 200). *Scenes*: three of these images in one.
- *Loss*: of the decoder, nats per held-out image, given its caption and 0 or 2 retrieved documents.
  It is comparable only between rows of equal fidelity: more codes say more about an image.
- *Match*: share of generated images whose nearest real image, of 50, is that of their own prompt
  (LPIPS, VGG16). Its standard error is up to five points.

The first row of the image shows held-out originals, the others what each tokenizer makes of them.

![The held-out images after each tokenizer](images/{image})
"""

if __name__ == "__main__":
    app.run(main)
