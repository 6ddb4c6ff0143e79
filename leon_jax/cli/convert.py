r"""Converts published weights to the format of leon_jax, and back.

    leon convert --from=taming --source=last.ckpt --config=model.yaml --out=models/vqgan
    leon convert --from=llamagen --source=vq_ds16_c2i.pt --out=models/vq16
    leon convert --from=llamagen --source=c2i_B_256.pt --vqgan=vq_ds16_c2i.pt \
        --out=models/llamagen-b
    leon convert --to=taming --source=models/vqgan --out=models/taming

--from=taming reads the image tokenizers of taming-transformers and of latent diffusion: with the
nearest code, with an averaged codebook, and with the Gumbel softmax. --config names the YAML file
beside the weights. Without it, the shapes of the tensors describe the network, and --resolution is
the side of the images. --from=llamagen reads the image tokenizers VQ-16 and VQ-8 of LlamaGen, and
its class-conditional GPTs (B, L, XL, XXL, 3B). A GPT needs --vqgan, the image tokenizer that it was
trained with. Its images have 256 px or 384 px; --resolution says which, or else the file's name.

--source names a file (.ckpt, .pt, .pth, .bin or .safetensors) or a folder with one. Nothing that a
file of PyTorch contains is run. Tensors that only training needs are left out.

--out receives the result and conversion.json: what was read, what was left out and why, and the
licence. An image tokenizer becomes tokenizer.safetensors, which leon encode, leon export and leon
train take. A GPT and its image tokenizer become a model folder, for leon generate --model. With
--to, --out receives the files of the family: weights.ckpt and model.yaml of an image tokenizer,
gpt.pt and vqgan.pt of a model folder.
"""

import pathlib
import re
import sys
from typing import TYPE_CHECKING, Any

from absl import flags

from leon_jax.config import UserError

if TYPE_CHECKING:
    import numpy as np

    from leon_jax.convert.checkpoint import Checkpoint

FAMILIES = ("taming", "llamagen")

FLAGS = flags.FlagValues()
_FROM = flags.DEFINE_enum("from", None, FAMILIES, "The format of --source.", flag_values=FLAGS)
_TO = flags.DEFINE_enum(
    "to", None, FAMILIES, "The format to write; --source is a folder of leon_jax then.",
    flag_values=FLAGS,
)  # fmt: skip
_SOURCE = flags.DEFINE_string("source", None, "The file or the folder to read.", flag_values=FLAGS)
_VQGAN = flags.DEFINE_string(
    "vqgan", None, "The file or the folder of the image tokenizer that a GPT was trained with.",
    flag_values=FLAGS,
)  # fmt: skip
_CONFIG = flags.DEFINE_string(
    "config", None, "The YAML file that describes the network.", flag_values=FLAGS
)
_RESOLUTION = flags.DEFINE_integer(
    "resolution", None, "Side of the images in pixels, without --config; by default 256, or what "
    "the name of a GPT's file says, such as c2i_L_384.pt.", lower_bound=8, flag_values=FLAGS,
)  # fmt: skip
_HEADS = flags.DEFINE_integer(
    "heads", None, "Attention heads of a GPT; by default those of the published size.",
    lower_bound=1, flag_values=FLAGS,
)  # fmt: skip
_CHECK = flags.DEFINE_bool(
    "check", True, "Try the converted weights on a test image at the end. A GPT is loaded into "
    "memory for it.", flag_values=FLAGS,
)  # fmt: skip
_OUT = flags.DEFINE_string("out", None, "The folder to write.", flag_values=FLAGS)

_DEFAULT_RESOLUTION = 256


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
    elif _TO.value == "llamagen" and (source / "decoder.safetensors").is_file():
        _write_gpt(source, out)
    elif _TO.value:
        _write(_TO.value, source, out)


def _read(name: str, source: pathlib.Path, out: pathlib.Path) -> None:
    """Converts to the format of leon_jax."""
    from leon_jax import config as configuration
    from leon_jax import storage
    from leon_jax.convert import checkpoint, image_tokenizers, llamagen_gpt, record
    from leon_jax.convert.published_model import write_tokenizer

    family = image_tokenizers.FAMILIES[name]
    opened = checkpoint.open_checkpoint(source)
    if name == "llamagen" and llamagen_gpt.is_gpt(opened.tensors):
        _read_gpt(source, opened, out)
        return
    if _VQGAN.value is not None:
        raise UserError(f"--vqgan is for a GPT of LlamaGen, but {source} has no GPT")
    config = None if _CONFIG.value is None else storage.local(storage.path(_CONFIG.value))
    resolution = _RESOLUTION.value or _DEFAULT_RESOLUTION
    converted = image_tokenizers.read(family, opened.tensors, config, resolution)
    values = configuration.to_dict(converted.config)
    print(
        f"{family.title}, licence {family.licence}: {converted.config.resolution} px, "
        f"{converted.config.grid} x {converted.config.grid} codes out of {converted.config.codes:,}"
    )
    _print_dropped(len(converted.dropped))
    record.write(
        out,
        lambda folder: write_tokenizer(folder, converted),
        {
            "from": name,
            "licence": family.licence,
            "files": record.of_files(opened.files),
            "config": values,
            "tensors": record.of_tensors(converted.used),
            "dropped": converted.dropped,
        },
    )
    if _CHECK.value:
        _check_tokenizer(out)
    print(f"wrote {out}")


def _read_gpt(source: pathlib.Path, opened: "Checkpoint", out: pathlib.Path) -> None:
    """Converts a GPT of LlamaGen and its image tokenizer to a model folder."""
    from leon_jax import config as configuration
    from leon_jax import storage
    from leon_jax.convert import checkpoint, image_tokenizers, llamagen_gpt, published_model, record

    if _VQGAN.value is None:
        raise UserError(
            f"{source} has a GPT of LlamaGen; name the image tokenizer that it was trained with, "
            "for example --vqgan=vq_ds16_c2i.pt"
        )
    resolution = _RESOLUTION.value
    if resolution is None:
        named = re.search(r"_(256|384|512)(?=\D*$)", source.name)
        resolution = int(named[1]) if named else _DEFAULT_RESOLUTION
    vqgan = checkpoint.open_checkpoint(storage.path(_VQGAN.value))
    tokenizer = image_tokenizers.read(
        image_tokenizers.FAMILIES["llamagen"], vqgan.tensors, None, resolution
    )
    gpt = llamagen_gpt.read(opened.tensors, tokenizer.config.grid, _HEADS.value)
    print(published_model.describe(gpt, tokenizer))
    _print_dropped(len(gpt.dropped) + len(tokenizer.dropped))
    sources = {"decoder": source.name, "tokenizer": storage.path(_VQGAN.value).name}
    parts: dict[str, Any] = {"decoder": gpt, "tokenizer": tokenizer}
    record.write(
        out,
        lambda folder: published_model.write_folder(folder, gpt, tokenizer, sources),
        {
            "from": "llamagen",
            "licence": published_model.LICENCE,
            "files": record.of_files((*opened.files, *vqgan.files)),
            "config": {name: configuration.to_dict(part.config) for name, part in parts.items()},
            "tensors": {name: record.of_tensors(part.used) for name, part in parts.items()},
            "dropped": {name: part.dropped for name, part in parts.items()},
        },
    )
    if _CHECK.value:
        losses = published_model.code_losses(out, _check_tokenizer(out))
        print(
            f"the loss of its codes: {losses.image:.2f} nats a code; in a random order "
            f"{losses.shuffled:.2f}, by chance {losses.chance:.2f}"
        )
        if not losses.is_plausible:
            _warn(
                "the codes of an image should have a smaller loss than codes in a random order and "
                "than chance, so the weights may be untrained, of another image tokenizer, or of "
                "another --resolution"
            )
    print(f"wrote {out}")


def _print_dropped(count: int) -> None:
    if count:
        print(f"left out: {count} tensor{'s' if count > 1 else ''}; conversion.json says why")


def _check_tokenizer(out: pathlib.Path) -> "np.ndarray":
    """Tries an image tokenizer on a test image, and returns the codes of the image."""
    from leon_jax.convert import check

    decibels, codes = check.reconstruction(out / "tokenizer.safetensors")
    print(f"a test image after encoding and decoding: {decibels:.1f} dB")
    if decibels < check.PLAUSIBLE:
        _warn(
            f"this is below {check.PLAUSIBLE:g} dB, so the weights may be untrained or belong to "
            "another network"
        )
    return codes


def _warn(sentence: str) -> None:
    print(f"leon convert: {sentence}", file=sys.stderr)


def _write(name: str, source: pathlib.Path, out: pathlib.Path) -> None:
    """Converts an image tokenizer from the format of leon_jax."""
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


def _write_gpt(source: pathlib.Path, out: pathlib.Path) -> None:
    """Converts a model folder to the two files of LlamaGen."""
    from leon_jax.convert import published_model, record, torch_file

    gpt, tokenizer = published_model.read_folder(source)
    names = ("decoder.safetensors", "tokenizer.safetensors")

    def write_files(folder: pathlib.Path) -> None:
        torch_file.write(folder / "gpt.pt", gpt, "model")
        torch_file.write(folder / "vqgan.pt", tokenizer, "model")

    record.write(
        out,
        write_files,
        {
            "to": "llamagen",
            "files": record.of_files(tuple(source / name for name in names)),
            "tensors": {
                "decoder": record.of_tensors(gpt), "tokenizer": record.of_tensors(tokenizer),
            },
        },
    )  # fmt: skip
    print(f"wrote {out}")
