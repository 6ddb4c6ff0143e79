"""The stages of fine-tuning: the decoder of a model continues on new images."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from leon_jax import config as configs
from leon_jax import weight_files
from leon_jax.config import UserError
from leon_jax.data.document_folder import MANIFEST, TRAIN, DocumentFolder
from leon_jax.model_folder import ModelFolder, encoder_path
from leon_jax.pipeline.stages import (
    Command,
    Inputs,
    Layout,
    Stage,
    adapt_batch,
    encode_command,
    prepare_command,
    sample_captions,
    train_command,
)

# OpenAI's CLIPs take images of this size, or of 336 pixels.
_CLIP_SIDE = 224
_KEYS = {"kind", "prepare", "encode", "share", "decoder", "seconds"}


def stages(
    values: Mapping[str, Any], inputs: Inputs, model: ModelFolder, index: pathlib.Path | None
) -> list[Stage]:
    """Returns the stages that fine-tune the decoder of a model and write a model folder.

    Args:
      values: the configuration, of configs/finetune.py.
      inputs: the new data and the workdir.
      model: the model to start from; its tokenizers and its encoder are used as they are.
      index: the documents that the model retrieves today, which the new model keeps; None: none.

    Raises:
      UserError: a key is unknown, or the decoder cannot be trained.
    """
    if unknown := set(values) - _KEYS:
        raise UserError(
            f"config.{min(unknown)} is unknown; the keys are {', '.join(sorted(_KEYS))}"
        )
    if not 0 < values["share"] <= 1:
        raise UserError(f"config.share is {values['share']}; it must be above 0 and at most 1")
    if model.config.form.head_ids is not None:
        raise UserError(
            f"the decoder of {model.path} predicts image codes only; fine-tuning needs one that "
            "predicts text, too"
        )
    files = Layout(inputs.workdir)
    models = {
        "tokenizer": model.path / "tokenizer.safetensors",
        "encoder": encoder_path(model.path),
        "text": model.path / "text.json",
    }
    settings = {"picture_side": _side(models), **values.get("prepare", {})}
    encode_flags = values.get("encode", {})
    everything = inputs.workdir / "all_documents"

    def collect() -> Command:
        return prepare_command("documents", inputs, files, settings, files.documents)

    def collect_all() -> Command:
        sources = [f"{TRAIN}=documents:{files.documents}", f"{TRAIN}=documents:{index}"]
        return prepare_command(
            "all_documents",
            Inputs(sources, _accept_flags(files.documents, index), inputs.workdir),
            files,
            settings,
            everything,
        )

    result = [
        Stage(
            "documents", "collect the new documents", collect,
            files.documents / MANIFEST, 20, True,
        ),
        Stage(
            "encode", "encode the new documents",
            lambda: encode_command(files.documents, models, encode_flags),
            files.documents / "encoded", 20, True,
        ),
    ]  # fmt: skip
    last = files.documents
    if index is not None:
        last = everything
        result += [
            Stage(
                "all_documents", "collect new and old documents", collect_all,
                everything / MANIFEST, 60, True,
            ),
            Stage(
                "encode_all", "encode new and old documents",
                lambda: encode_command(everything, models, encode_flags),
                everything / "encoded", 240, True,
            ),
        ]  # fmt: skip

    def decoder() -> Command:
        config, notes = adapt_batch("decoder", values["decoder"], DocumentFolder(last), least=1)
        data = {"variants": encode_flags.get("variants", 1), **config["data"]}
        if index is None:
            data["folder"] = str(files.documents)
        else:
            share = values["share"]
            data["mixture"] = [
                {"folder": str(files.documents), "weight": share},
                *([{"folder": str(everything), "weight": 1 - share}] if share < 1 else []),
            ]
        data |= _data_of(model)
        tuned = {
            **config,
            "model": configs.to_dict(model.config),
            "vocabulary": configs.to_dict(model.tokenizer.vocabulary),
            "data": data | {"text": str(models["text"])},
            "samples": {
                "captions": sample_captions(files.documents),
                "image": str(models["tokenizer"]),
                **config.get("samples", {}),
            },
            "loop": {
                **config.get("loop", {}),
                "init_from": str(model.path / "decoder.safetensors"),
            },
        }
        return train_command("decoder", tuned, files, notes)

    def export() -> Command:
        selection = model.path / "selection.json"
        return Command(
            (
                "export", f"--workdir={inputs.workdir / 'decoder'}",
                *(f"--{kind}={path}" for kind, path in models.items()),
                *([f"--selection={selection}"] if selection.is_file() else []),
                f"--index={last}", f"--out={files.model}",
            )
        )  # fmt: skip

    seconds = values.get("seconds", {})
    return [
        *result,
        Stage("decoder", "fine-tune the decoder", decoder, files.decoder("decoder"),
              seconds.get("decoder", 60)),
        Stage("model", "write the model folder", export, files.model / "model.json", 5),
    ]  # fmt: skip


def _side(models: Mapping[str, pathlib.Path]) -> int:
    """Returns the side of stored images, in pixels, that both models need."""
    side = weight_files.read_config(models["tokenizer"], "tokenizer")["resolution"]
    if models["encoder"].is_dir():
        return max(side, _CLIP_SIDE)
    encoder = weight_files.read_config(models["encoder"], "encoder")
    return max(side, encoder["vision"]["image_size"])


def _data_of(model: ModelFolder) -> dict[str, Any]:
    """Returns the settings of training data that follow from a model."""
    rows, columns = model.tokenizer.image_shape
    step = model.config.part_step
    # A document has an image and a text of one step; every part is rounded up to whole steps.
    tokens = rows * columns + step
    positions = -(-(rows * columns + 1) // step) * step + step
    length = model.context if step == 1 else model.context // positions * tokens
    return {"image_shape": (rows, columns), "length": max(length, tokens)}


def _accept_flags(*folders: os.PathLike | str | None) -> list[str]:
    """Returns the flags that accept every licence that documents folders were made with."""
    licences = {
        licence
        for folder in folders
        if folder is not None
        for licence in DocumentFolder(folder).manifest["config"].get("licences", ())
    }
    return [f"--accept={licence}" for licence in sorted(licences)]
