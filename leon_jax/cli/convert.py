r"""Converts published weights to the format of leon_jax, and back.

    leon convert --from=taming --source=last.ckpt --config=model.yaml --out=models/vqgan
    leon convert --from=llamagen --source=vq_ds16_c2i.pt --out=models/vq16
    leon convert --to=taming --source=models/vqgan --out=models/taming

--from=taming reads the image tokenizers of taming-transformers and of latent diffusion: with the
nearest code, with an averaged codebook, and with the Gumbel softmax. --config names the YAML file
beside the weights. Without it, the shapes of the tensors describe the network, and --resolution is
the side of the images. --from=llamagen reads the image tokenizers VQ-16 and VQ-8 of LlamaGen.

--source names a file (.ckpt, .pt, .pth, .bin or .safetensors) or a folder with one. Nothing that a
file of PyTorch contains is run. Tensors that only training needs are left out.

--out receives tokenizer.safetensors, which leon encode, leon export and leon train take as the
image tokenizer, and conversion.json: what was read, what was left out and why, and the licence.
With --to, it receives weights.ckpt and model.yaml in the format of the family.
"""

import pathlib
import sys

from absl import flags

from leon_jax.config import UserError

FAMILIES = ("taming", "llamagen")

FLAGS = flags.FlagValues()
_FROM = flags.DEFINE_enum("from", None, FAMILIES, "The format of --source.", flag_values=FLAGS)
_TO = flags.DEFINE_enum(
    "to", None, FAMILIES, "The format to write; --source is a folder of leon_jax then.",
    flag_values=FLAGS,
)  # fmt: skip
_SOURCE = flags.DEFINE_string("source", None, "The file or the folder to read.", flag_values=FLAGS)
_CONFIG = flags.DEFINE_string(
    "config", None, "The YAML file that describes the network.", flag_values=FLAGS
)
_RESOLUTION = flags.DEFINE_integer(
    "resolution", 256, "Side of the images in pixels, without --config.", lower_bound=8,
    flag_values=FLAGS,
)  # fmt: skip
_OUT = flags.DEFINE_string("out", None, "The folder to write.", flag_values=FLAGS)


def main(argv: list[str]) -> None:
    """Runs `leon convert`.

    Raises:
      UserError: a flag is missing, a file is missing or damaged, or the tensors are not those of
        the format.
    """
    del argv
    if bool(_FROM.value) == bool(_TO.value):
        raise UserError("give --from or --to, for example --from=taming")
    if not _SOURCE.value:
        raise UserError("--source is missing; it names a file or a folder")
    if not _OUT.value:
        raise UserError("--out is missing; for example --out=models/vqgan")
    from leon_jax import storage
    from leon_jax.convert import record

    source, out = storage.path(_SOURCE.value), storage.path(_OUT.value)
    record.check_out(out)
    if _FROM.value:
        _read(_FROM.value, source, out)
    elif _TO.value:
        _write(_TO.value, source, out)


def _read(name: str, source: pathlib.Path, out: pathlib.Path) -> None:
    """Converts to the format of leon_jax."""
    import json

    from leon_jax import config as configuration
    from leon_jax import safetensors_format, storage, weight_files
    from leon_jax.convert import check, checkpoint, image_tokenizers, record

    family = image_tokenizers.FAMILIES[name]
    opened = checkpoint.open_checkpoint(source)
    config = None if _CONFIG.value is None else storage.local(storage.path(_CONFIG.value))
    converted = image_tokenizers.read(family, opened.tensors, config, _RESOLUTION.value)
    values = configuration.to_dict(converted.config)
    print(
        f"{family.title}, licence {family.licence}: {converted.config.resolution} px, "
        f"{converted.config.grid} x {converted.config.grid} codes out of {converted.config.codes:,}"
    )
    if converted.dropped:
        print(f"left out: {len(converted.dropped)} tensors that only training needs")

    def write_files(folder: pathlib.Path) -> None:
        metadata = {
            "format": weight_files.FORMAT, "kind": "tokenizer", "config": json.dumps(values),
        }  # fmt: skip
        safetensors_format.write(folder / "tokenizer.safetensors", converted.arrays, metadata)

    record.write(
        out,
        write_files,
        {
            "from": name,
            "licence": family.licence,
            "files": record.of_files(opened.files),
            "config": values,
            "tensors": record.of_tensors(converted.used),
            "dropped": converted.dropped,
        },
    )
    decibels = check.reconstruction(out / "tokenizer.safetensors")
    print(f"a test image after encoding and decoding: {decibels:.1f} dB")
    if decibels < check.PLAUSIBLE:
        print(
            f"leon convert: this is below {check.PLAUSIBLE:g} dB, so the weights may be untrained "
            "or belong to another network",
            file=sys.stderr,
        )
    print(f"wrote {out}")


def _write(name: str, source: pathlib.Path, out: pathlib.Path) -> None:
    """Converts from the format of leon_jax."""
    from leon_jax import weight_files
    from leon_jax.config import build
    from leon_jax.convert import image_tokenizers, record, torch_file
    from leon_jax.models.vqgan import VQGANConfig

    family = image_tokenizers.FAMILIES[name]
    path = source / "tokenizer.safetensors" if source.is_dir() else source
    arrays, values = weight_files.load(path, "tokenizer")
    config = build(VQGANConfig, values, "config")
    tensors = image_tokenizers.write(family, config, arrays)

    def write_files(folder: pathlib.Path) -> None:
        torch_file.write(folder / "weights.ckpt", tensors, family.envelope)
        (folder / "model.yaml").write_text(image_tokenizers.describe(config), encoding="utf-8")

    record.write(
        out,
        write_files,
        {"to": name, "files": record.of_files((path,)), "tensors": record.of_tensors(tensors)},
    )
    print(f"wrote {out}")
