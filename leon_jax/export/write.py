"""Writes a complete model folder: its files, `model.json` and the model card."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import platform
import shutil
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import jax.numpy as jnp

from leon_jax import __version__, model_description, storage, weight_files
from leon_jax.compilation_cache import cache_folder
from leon_jax.config import UserError, build
from leon_jax.export import provenance
from leon_jax.export.model_card import card
from leon_jax.export.parts import NAMES, Parts
from leon_jax.export.provenance import Provenance
from leon_jax.model_description import (
    NUM_DOCS,
    GenerationDefaults,
    IndexAddress,
    ModelDescription,
)
from leon_jax.model_folder import CARD, FILES, INDEX, SELECTION, ModelFolder, encoder_path
from leon_jax.models.clip import CLIPConfig
from leon_jax.models.vqgan import VQGANConfig
from leon_jax.prepare.encoding_models import digest, matches
from leon_jax.retrieval.encoder import SPECIALS
from leon_jax.retrieval.prepared_folder import PreparedFolder, read_manifest

_PACKAGES = ("jax", "jaxlib", "flax", "numpy")


@dataclasses.dataclass(frozen=True)
class ExportSettings:
    """The settings of a model folder that the user chooses.

    Attributes:
      title: heading of the card; "": the name of the folder.
      prompt: a prompt for the command of the card; "": the first caption of the index, or a sample
        prompt of the run.
      guidance, top_p: generation defaults; None: those of the model that the decoder comes from, or
        the guidance of the run's samples.
      num_docs: the default number of documents; None: 2, and no more than fit or were trained.
      licences: SPDX expressions of the data of the parts whose data have no recorded licence.
      notes: Markdown for the end of the card.
      copy_index: copy the index into the folder.
      dtype: "bfloat16" stores the weights of the decoder in two bytes each; "": as trained.
    """

    title: str = ""
    prompt: str = ""
    guidance: float | None = None
    top_p: float | None = None
    num_docs: int | None = None
    licences: tuple[str, ...] = ()
    notes: str = ""
    copy_index: bool = False
    dtype: str = ""


def write(
    parts: Parts,
    out: pathlib.Path,
    settings: ExportSettings,
    decoder: Provenance | None = None,
) -> ModelFolder:
    """Writes a model folder. It appears, or replaces an older one, when it is complete.

    Args:
      parts: all parts.
      out: the folder. Files in it that are not of a model folder are kept.
      settings: the settings.
      decoder: see `complete`.

    Raises:
      UserError: `out` is not a model folder, or cannot be written; or the parts do not belong
        together, or the index was made with other parts.
    """
    _check_out(out)
    temporary = staging_folder(out)
    with _writing(out):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        decoder_file = storage.local(parts.path("decoder"))
        if settings.dtype:
            weight_files.convert(
                decoder_file, temporary / "decoder.safetensors", jnp.dtype(settings.dtype)
            )
        else:
            shutil.copyfile(decoder_file, temporary / "decoder.safetensors")
        shutil.copyfile(storage.local(parts.path("text")), temporary / "text.json")
        return complete(temporary, parts, out, settings, decoder)


def staging_folder(out: pathlib.Path) -> pathlib.Path:
    """Returns the folder in which the files are written first: beside `out`, or in the cache."""
    out = storage.absolute(out)
    if storage.is_bucket(out):
        digest = hashlib.sha256(str(out).encode()).hexdigest()[:16]
        return cache_folder() / "writing" / digest / out.name
    return out.with_name(f".{out.name}.writing")


def complete(
    temporary: pathlib.Path,
    parts: Parts,
    out: pathlib.Path,
    settings: ExportSettings,
    decoder: Provenance | None = None,
) -> ModelFolder:
    """Adds the other files to a folder with decoder and text tokenizer, and moves it to `out`.

    Args:
      temporary: `staging_folder(out)`. It is removed if something fails.
      parts: all parts; only the two that `temporary` holds may be elsewhere by now.
      out: see `write`.
      settings: the settings.
      decoder: what is known of the decoder, if a run has just written it; None: what is known of
        `parts.decoder`.

    Raises:
      UserError: see `write`.
    """
    out = storage.absolute(out)
    with _writing(out):
        try:
            tokenizer = storage.local(parts.path("tokenizer"))
            shutil.copyfile(tokenizer, temporary / "tokenizer.safetensors")
            encoder = storage.local(parts.path("encoder"))
            if encoder.is_dir():
                shutil.copytree(encoder, temporary / "encoder")
            else:
                shutil.copyfile(encoder, temporary / "encoder.safetensors")
            if parts.selection is not None:
                (temporary / SELECTION).write_text(json.dumps(parts.selection) + "\n")
            folder = ModelFolder.open(temporary)
            check_parts(folder)
            check_index(folder, parts.index)
            index = parts.index
            if settings.copy_index and index.folder:
                shutil.copytree(storage.local(index.folder), temporary / INDEX)
                index = IndexAddress(folder=INDEX)
            known = {
                name: decoder
                if name == "decoder" and decoder
                else provenance.of_part(name, parts.path(name))
                for name in NAMES
            }
            description = describe(
                folder, known, dataclasses.replace(settings, title=settings.title or out.name),
                index, None if decoder else parts.decoder,
            )  # fmt: skip
            write_description(folder, description)
            _publish(temporary, out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return ModelFolder.open(out)


def write_description(folder: ModelFolder, description: ModelDescription) -> None:
    """Writes `model.json` and the model card into a model folder, each atomically."""
    for name, text in (
        (model_description.FILE, description.to_json()),
        (CARD, card(folder, description)),
    ):
        storage.write(folder.path / name, text)


def describe(
    folder: ModelFolder,
    known: dict[str, Provenance],
    settings: ExportSettings,
    index: IndexAddress,
    decoder: pathlib.Path | None = None,
) -> ModelDescription:
    """Returns the description of a model folder.

    Args:
      folder: the folder with all files.
      known: what is known of each part.
      settings: the settings.
      index: where the documents are.
      decoder: where the decoder comes from. If that is in a model folder, its sampling parameters
        are kept. None: it comes from a run.
    """
    data = provenance.merge(each for part in known.values() for each in part.data)
    licences = [licence for part in known.values() for licence in part.licences]
    unknown = tuple(name for name, part in known.items() if not part.is_complete)
    if settings.licences:
        licences, unknown = [*licences, *settings.licences], ()
    defaults = _defaults(folder, known["decoder"].training, settings, decoder)
    parts = {name: folder.path / name for name in FILES}
    paths = {
        "decoder": parts["decoder.safetensors"],
        "tokenizer": parts["tokenizer.safetensors"],
        "text": parts["text.json"],
        "encoder": encoder_path(folder.path),
    }
    return ModelDescription(
        title=settings.title,
        prompt=settings.prompt or _prompt(known["decoder"].training, index, folder),
        generation={
            "sampling": defaults.sampling.to_dict(),
            "num_docs": defaults.num_docs,
            "max_docs": folder.max_docs,
        },
        index=index,
        licences=tuple(sorted(dict.fromkeys(licences))),
        unknown_licences=unknown,
        data=data,
        training={name: part.training for name, part in known.items() if part.training},
        versions=versions(),
        digests={name: digest(path) for name, path in paths.items()},
        notes=settings.notes,
    )


def versions() -> dict[str, str]:
    """Returns the versions of leon_jax, Python and the packages that matter for results."""
    known = {"leon_jax": __version__, "python": platform.python_version()}
    return known | {name: metadata.version(name) for name in _PACKAGES}


def check_parts(folder: ModelFolder) -> None:
    """Checks by the headers of the files that the parts of a model folder belong together.

    Raises:
      UserError: they do not.
    """
    tokenizer, path = folder.tokenizer, folder.path
    config = build(
        VQGANConfig, weight_files.read_config(path / "tokenizer.safetensors", "tokenizer"), "config"
    )
    shape, expected = (config.grid, config.grid), tokenizer.image_shape
    codes, expected_codes = config.codes, tokenizer.vocabulary.image_codes
    if (shape, codes) != (expected, expected_codes):
        raise UserError(
            f"the image tokenizer makes images of {shape} codes out of {codes}, but the decoder "
            f"reads {expected} out of {expected_codes}; give the image tokenizer that the decoder "
            "was trained with"
        )
    encoder = encoder_path(path)
    if encoder.is_dir():
        return
    clip = build(CLIPConfig, weight_files.read_config(encoder, "encoder"), "config")
    if clip.text.vocab_size != tokenizer.text.size + SPECIALS:
        raise UserError(
            "the encoder was trained with a text tokenizer of "
            f"{clip.text.vocab_size - SPECIALS} entries, but the decoder's has "
            f"{tokenizer.text.size}; give the encoder of this text tokenizer"
        )


def check_index(folder: ModelFolder, index: IndexAddress) -> None:
    """Checks that an index was made with the files of a model folder.

    Raises:
      UserError: it was made with other files, or is not a prepared folder.
    """
    if not index.folder:
        return
    recorded = read_manifest(storage.path(index.folder))["sha256"]
    for kind, path in (
        ("tokenizer", folder.path / "tokenizer.safetensors"),
        ("encoder", encoder_path(folder.path)),
        ("text", folder.path / "text.json"),
    ):
        if not matches(path, recorded.get(kind)):
            raise UserError(
                f"the index {index.folder} was encoded with another {kind} file; encode its "
                "documents with the files of this model, or leave the index out"
            )


def _defaults(
    folder: ModelFolder,
    training: dict[str, Any],
    settings: ExportSettings,
    decoder: pathlib.Path | None,
) -> GenerationDefaults:
    config = training.get("config") or {}
    base = model_description.read(decoder.parent) if decoder else None
    sampling = (base.defaults() if base else GenerationDefaults()).sampling
    guidance = settings.guidance
    if guidance is None and base is None:
        guidance = (config.get("samples") or {}).get("guidance")
    sampling = sampling.replace(guidance=guidance, top_p=settings.top_p)
    num_docs = settings.num_docs
    if num_docs is None:
        num_docs = min(NUM_DOCS, folder.max_docs, _trained_docs(config.get("data") or {}))
    elif not 0 <= num_docs <= folder.max_docs:
        raise UserError(
            f"num_docs is {num_docs}, but a context of {folder.context} tokens holds at most "
            f"{folder.max_docs} retrieved documents beside an image of "
            f"{folder.tokenizer.image_tokens} tokens"
        )
    return GenerationDefaults(sampling, num_docs)


def _trained_docs(data: dict[str, Any]) -> int:
    """Returns the largest number of documents that the decoder was trained with."""
    several: Sequence[Any] = [each.get("retrieved") for each in data.get("mixture") or ()]
    shares = [each for each in (data.get("retrieved"), *several) if each]
    if not shares:
        return NUM_DOCS
    return max(
        number for each in shares for number, share in enumerate(each) if share > 0 or number == 0
    )


def _prompt(training: dict[str, Any], index: IndexAddress, folder: ModelFolder) -> str:
    if index.folder:
        records = PreparedFolder(storage.join(folder.path, index.folder)).records(pixels=False)
        if len(records) and records[0].text:
            return records[0].text
    captions = ((training.get("config") or {}).get("samples") or {}).get("captions")
    return captions[0] if captions else ""


def _check_out(out: pathlib.Path) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / "decoder.safetensors").is_file():
        raise UserError(f"{out} exists and is not a model folder; name another folder")


def _publish(temporary: pathlib.Path, out: pathlib.Path) -> None:
    """Renames `temporary` to `out`; other files of an older `out` move into it.

    In a bucket the decoder is copied last.
    """
    if storage.is_bucket(out):
        storage.upload(temporary, out, FILES[0], is_complete_folder=False)
        return
    former = out.with_name(f".{out.name}.former")
    shutil.rmtree(former, ignore_errors=True)
    if out.exists():
        os.rename(out, former)
    try:
        os.rename(temporary, out)
    except OSError:
        if former.exists():
            os.rename(former, out)
        raise
    own = {*FILES, SELECTION, CARD, INDEX, "encoder", "encoder.safetensors", model_description.FILE}
    for path in former.iterdir() if former.exists() else ():
        if path.name not in own and not path.name.endswith(".tmp"):
            os.rename(path, out / path.name)
    shutil.rmtree(former, ignore_errors=True)


@contextlib.contextmanager
def _writing(out: pathlib.Path):
    try:
        yield
    except (OSError, shutil.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"the model folder {out} cannot be written: {reason}") from error
