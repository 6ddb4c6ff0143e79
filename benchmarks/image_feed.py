#!/usr/bin/env python3
"""Benchmarks the training images of the image tokenizer and of the encoder beside WebDataset.

    python -m benchmarks.image_feed --folder=out/image_feed

The first run writes crops of a photograph into the folder, as records and as tar files (0.4 GB).
Then the feeds take turns on one core: `TokenizerProgram.batches` of configs/vqgan_256.py,
`EncoderProgram.batches` of configs/clip_b32.py, and WebDataset with the same random crops by
Pillow, which torchvision's transforms call as well. Writes the section "Images" of
docs/input_pipeline.md.
"""

import argparse
import importlib.metadata
import io
import itertools
import os
import pathlib
import runpy
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import matplotlib.cbook
import numpy as np
import PIL.Image
import webdataset

from benchmarks.quiet import Watch, wait
from leon_jax import config as configs
from leon_jax import sharding
from leon_jax.data import augment, records
from leon_jax.data.augment import CropConfig
from leon_jax.documents import Document, Image, Provenance, Text
from leon_jax.models.clip import create
from leon_jax.retrieval.prepared_folder import write_split
from leon_jax.tokenizers.text import TextTokenizer
from leon_jax.train.image_tokenizer import TokenizerConfig, TokenizerProgram
from leon_jax.train.peak_flops import CHIPS
from leon_jax.train.retrieval_encoder import EncoderConfig, EncoderProgram

ROOT = pathlib.Path(__file__).resolve().parents[1]
HEADING = "## Images"
SIDE, BATCH, FORMATS = 256, 64, ("png", "jpeg")
# A host of a v5e slice of several hosts, the machine ct5lp-hightpu-4t. A core has two vCPUs.
HOST_CHIPS, HOST_CPUS, MFU = 4, 112, 0.6

SECTION = """\
{heading}

```bash
python -m benchmarks.image_feed --folder=out/image_feed
```

The image tokenizer and the encoder train on decoded, randomly cropped images. The benchmark reads
{images:,} crops of a photograph, stored with a shorter side of {side} pixels, in batches of
{batch}. It times `TokenizerProgram.batches` of `configs/vqgan_256.py` and `EncoderProgram.batches`
of `configs/clip_b32.py`. WebDataset {webdataset} reads the same files from tar files, and crops,
resizes and mirrors them with the same calls of Pillow {pillow}. torchvision's transforms of PIL
images make the same calls.

The feeds take turns on one core, in {rounds} rounds. The numbers are images for each second of CPU
time of the process, so that other programs distort them less. These used up to {others} of the CPU.

{table}

{needs}

`data.threads` threads decode the images. How their speed grows over the many cores of such a host
has not been measured: decoding and resizing run without Python's lock, the rest takes turns.
"""


def crops(count: int) -> Iterator[PIL.Image.Image]:
    """Yields parts of a photograph; none is enlarged."""
    path = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    photograph = PIL.Image.open(path).convert("RGB")
    rng = np.random.default_rng(0)
    for _ in range(count):
        width, height = (int(side) for side in rng.integers(SIDE, 400, 2))
        left = int(rng.integers(0, photograph.width - width + 1))
        top = int(rng.integers(0, photograph.height - height + 1))
        part = photograph.crop((left, top, left + width, top + height))
        scale = SIDE / min(part.size)
        yield part.resize((round(width * scale), round(height * scale)))


def encode(image: PIL.Image.Image, image_format: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, quality=90)
    return buffer.getvalue()


def write(folder: pathlib.Path, count: int) -> None:
    """Writes the images of each format as a documents folder and as tar files, once."""
    to_png = records.to_png
    for image_format in FORMATS:
        out = folder / image_format
        if (out / "manifest.json").exists():
            continue
        out.mkdir(parents=True, exist_ok=True)
        # A record may hold an image of any format that Pillow reads.
        records.to_png = lambda pixels, name=image_format: encode(PIL.Image.fromarray(pixels), name)
        with webdataset.ShardWriter(f"{out}/%03d.tar", maxcount=500, verbose=0) as tar:
            documents = []
            for number, image in enumerate(crops(count)):
                caption = f"part {number} of a portrait"
                provenance = Provenance(str(number), "photograph", "CC0-1.0", "")
                parts = (Text(caption), Image(pixels=np.asarray(image)))
                documents.append(Document(parts, provenance))
                data = encode(image, image_format)
                tar.write({"__key__": f"{number:06}", image_format: data, "txt": caption})
            write_split(out, "train", documents)
        records.to_png = to_png
    captions = (f"part {number} of a portrait" for number in range(count))
    TextTokenizer.train(captions, 1000).save(folder / "text.json")


def values(name: str, **changes) -> dict:
    read = runpy.run_path(str(ROOT / "configs" / name))["get_config"]().to_dict()
    del read["loop"]
    return read | {"batch_size": BATCH} | changes


def tokenizer_program(folder: pathlib.Path, image_format: str, threads: int) -> TokenizerProgram:
    data = {"folder": str(folder / image_format), "threads": threads}
    return TokenizerProgram(configs.build(TokenizerConfig, values("vqgan_256.py", data=data)))


def encoder_program(folder: pathlib.Path, image_format: str, threads: int) -> EncoderProgram:
    data = {"folder": str(folder / image_format), "threads": threads}
    data["text"] = str(folder / "text.json")
    return EncoderProgram(configs.build(EncoderConfig, values("clip_b32.py", data=data)))


def webdataset_batches(folder: pathlib.Path, image_format: str) -> Iterator[np.ndarray]:
    """Yields endless shuffled batches of random crops, read by WebDataset."""
    paths = sorted(str(path) for path in (folder / image_format).glob("*.tar"))
    rng, config = np.random.default_rng(0), CropConfig()

    def crop(image: PIL.Image.Image) -> np.ndarray:
        top, left, side = augment.random_square((image.height, image.width), config.crop, rng)
        image = image.crop((left, top, left + side, top + side))
        image = image.resize((SIDE, SIDE), PIL.Image.Resampling.LANCZOS)
        if rng.random() < config.mirror:
            image = image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(image)

    dataset = webdataset.WebDataset(paths, shardshuffle=len(paths), empty_check=False)
    images = dataset.shuffle(1000).decode("pil").to_tuple(image_format).map_tuple(crop).repeat()
    iterator = iter(images)
    while True:
        yield np.stack([image for (image,) in itertools.islice(iterator, BATCH)])


def rate(batches: Iterator, seconds: float) -> float:
    """Returns the images for each second of CPU time; the first batch is not counted."""
    next(batches)
    count, end, start = 0, time.monotonic() + seconds, time.process_time()
    while time.monotonic() < end:
        next(batches)
        count += BATCH
    return count / (time.process_time() - start)


def feeds(folder: pathlib.Path) -> dict[tuple[str, str], Callable[[], Iterator]]:
    """Returns functions that open a feed, by its name and the format of the images."""
    opened: dict[tuple[str, str], Callable[[], Iterator]] = {}
    for image_format in FORMATS:
        for threads in (0, 4):
            name = f"image tokenizer, {SIDE} px, {threads or 'no'} threads"
            program = tokenizer_program(folder, image_format, threads)
            opened[name, image_format] = lambda program=program: iter(program.batches())
        opened[f"WebDataset, {SIDE} px", image_format] = lambda name=image_format: (
            webdataset_batches(folder, name)
        )
        encoder = encoder_program(folder, image_format, 0)
        opened["encoder, 224 px, no threads", image_format] = lambda program=encoder: iter(
            program.batches()
        )
    return opened


def needs(folder: pathlib.Path, rates: dict[tuple[str, str], float]) -> str:
    """Returns how many cores a host of a v5e slice needs, with the arithmetic."""
    chip = next(chip for chip in CHIPS if chip.name == "v5e")
    sentences = [
        f"A host of v5e-16x16 has {HOST_CHIPS} of the 256 chips and {HOST_CPUS} vCPUs, which are "
        f"{HOST_CPUS // 2} cores. At {100 * MFU:.0f} % MFU, which is an upper bound, its chips "
        f"compute {HOST_CHIPS} x {chip.flops / 1e12:.0f}e12 x {MFU:g} = "
        f"{HOST_CHIPS * chip.flops * MFU / 1e12:.0f}e12 operations a second."
    ]
    programs = (
        ("image tokenizer", f"image tokenizer, {SIDE} px, no threads",
         tokenizer_flops(tokenizer_program(folder, "png", 0))),
        ("encoder", "encoder, 224 px, no threads",
         encoder_flops(encoder_program(folder, "png", 0))),
    )  # fmt: skip
    for name, feed, flops in programs:
        speed = HOST_CHIPS * chip.flops * MFU / flops
        cores = " and ".join(
            f"{speed:,.0f} / {rates[feed, kind]:,.0f} = {speed / rates[feed, kind]:.1f} cores "
            f"({kind.upper()})"
            for kind in FORMATS
        )
        sentences.append(
            f"An update of the {name} takes {flops / 1e9:,.0f}e9 operations an image, so a host "
            f"consumes at most {speed:,.0f} images a second. That needs {cores}."
        )
    return "\n\n".join(sentences)


def tokenizer_flops(program: TokenizerProgram) -> float:
    """Returns the operations of an update per image, counted by XLA before optimisation."""
    with jax.set_mesh(sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])):
        state = jax.eval_shape(program.init, jax.random.key(0))
        batch = {"images": jax.ShapeDtypeStruct((2, SIDE, SIDE, 3), jnp.uint8)}
        return jax.jit(program.step).lower(state, batch).cost_analysis()["flops"] / 2


def encoder_flops(program: EncoderProgram) -> float:
    """Returns 6 operations for each weight of the blocks and each token, without recomputation."""
    config = program.config.model
    with jax.set_mesh(sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])):
        model = jax.eval_shape(lambda: create(config, jax.random.key(0)))
    vision, text = (
        sum(leaf.size for leaf in jax.tree.leaves(blocks))
        for blocks in (model.vision_blocks, model.text_blocks)
    )
    return 6.0 * (vision * (config.vision.patches + 1) + text * config.text.context_length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="folder of the images")
    parser.add_argument("--images", type=int, default=2000, help="number of images")
    parser.add_argument("--seconds", type=float, default=4, help="duration of a measurement")
    parser.add_argument("--rounds", type=int, default=5, help="measurements per number")
    parser.add_argument("--noise", type=float, default=0.1, help="CPU that others may use at start")
    parser.add_argument("--patience", type=float, default=120, help="seconds to wait for that")
    parser.add_argument(
        "--out", type=pathlib.Path, default=ROOT / "docs" / "input_pipeline.md", help="the page"
    )
    options = parser.parse_args()
    cores = os.sched_getaffinity(0)
    if len(cores) > 1:  # start again on one core, before any library starts threads
        os.sched_setaffinity(0, {min(cores)})
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.image_feed", *sys.argv[1:]])
    write(options.folder, options.images)
    opened, others = feeds(options.folder), 0.0
    results: dict[tuple[str, str], list[float]] = {feed: [] for feed in opened}
    wait(options.noise, options.patience)
    for number in range(options.rounds):
        for feed, make in opened.items():
            watch = Watch(())
            results[feed].append(rate(make(), options.seconds))
            others = max(others, watch.others())
            print(f"round {number}: {feed}: {results[feed][-1]:.0f}", file=sys.stderr, flush=True)
    rates = {feed: statistics.median(speeds) for feed, speeds in results.items()}
    lines = ["| feed | images/s a core, PNG | JPEG |", "| --- | --- | --- |"]
    for name in dict.fromkeys(name for name, _ in rates):
        lines.append(f"| {name} | {rates[name, 'png']:,.0f} | {rates[name, 'jpeg']:,.0f} |")
    section = SECTION.format(
        heading=HEADING, images=options.images, side=SIDE, batch=BATCH,
        webdataset=importlib.metadata.version("webdataset"),
        pillow=importlib.metadata.version("pillow"), rounds=options.rounds,
        others=f"{100 * others:.0f} %", table="\n".join(lines),
        needs=needs(options.folder, rates),
    )  # fmt: skip
    before = options.out.read_text().partition(f"\n{HEADING}\n")[0].rstrip()
    paragraphs = [
        part if part.startswith(("`" * 3, "|", "#")) else textwrap.fill(part, 105)
        for part in section.split("\n\n")
    ]
    options.out.write_text("\n\n".join([before, *paragraphs]) + "\n")


if __name__ == "__main__":
    main()
