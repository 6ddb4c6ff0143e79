r"""Writes a model folder: everything that `leon generate --model=FOLDER` needs, with a model card.

    leon export --workdir=runs/emoji/decoder --out=models/emoji
    leon export --decoder=runs/emoji/decoder/export/decoder.safetensors \
      --text=runs/emoji/text/export/text.json \
      --tokenizer=runs/emoji/tokenizer/export/tokenizer.safetensors \
      --encoder=runs/emoji/encoder/export/encoder.safetensors --out=models/emoji
    leon export --workdir=runs/emoji/decoder --step=best --out=models/emoji_best

--workdir names the run of a decoder. Its config names the image tokenizer. The prepared folder that
it read is the index, and tells the encoder by its digest: leon looks for it beside the tokenizers,
and in the runs beside theirs. Other flags replace what is found.

--step takes the decoder from a checkpoint of the run, which may not be finished: best (the lowest
held-out loss, see config.loop.eval_every of leon train), newest, or the number of a step. With
--step, --workdir may also name the run of an image tokenizer or a retrieval encoder; --out receives
the files that the end of the run writes. A run with config.optimizer.average exports the averaged
weights; --noaverage exports the weights after the last update.

The folder has decoder.safetensors, tokenizer.safetensors, text.json, encoder.safetensors (or a
folder encoder), selection.json, model.json and README.md. It appears when it is complete. A .tar of
the folder is a model too: tar -cf emoji.tar -C models emoji
"""

import pathlib
import sys
from typing import TYPE_CHECKING, Any

from absl import flags

from leon_jax import storage
from leon_jax.config import UserError

if TYPE_CHECKING:
    from leon_jax.export.parts import Parts
    from leon_jax.export.provenance import Provenance

FLAGS = flags.FlagValues()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "The folder of a decoder's training run.", flag_values=FLAGS
)
_STEP = flags.DEFINE_string(
    "step", None, "The checkpoint of --workdir: best, newest, or the number of its step; by "
    "default the model at the end of the run.", flag_values=FLAGS,
)  # fmt: skip
_AVERAGE = flags.DEFINE_bool(
    "average", True, "With --step: the averaged weights of a run with config.optimizer.average; "
    "--noaverage: the weights after the last update.", flag_values=FLAGS,
)  # fmt: skip
_DECODER = flags.DEFINE_string("decoder", None, "The decoder's file.", flag_values=FLAGS)
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "The image tokenizer's file.", flag_values=FLAGS
)
_TEXT = flags.DEFINE_string("text", None, "The text tokenizer's file.", flag_values=FLAGS)
_ENCODER = flags.DEFINE_string(
    "encoder", None, "The retrieval encoder: a file, or a folder of OpenAI's CLIP.",
    flag_values=FLAGS,
)  # fmt: skip
_SELECTION = flags.DEFINE_string(
    "selection", None, "The selection rules of the encoder (JSON); by default selection.json "
    "beside it, or the rules of the prepared folder.", flag_values=FLAGS,
)  # fmt: skip
_INDEX = flags.DEFINE_string(
    "index", None, "The prepared folder that the model retrieves from; prepare:demo for the "
    "emoji documents.", flag_values=FLAGS,
)  # fmt: skip
_COPY_INDEX = flags.DEFINE_bool(
    "copy_index", False, "Copy the index into the folder, so that the folder needs no other.",
    flag_values=FLAGS,
)  # fmt: skip
_GUIDANCE = flags.DEFINE_float(
    "guidance", None, "The default guidance weight of generation; by default that of the run's "
    "samples, or 3.", flag_values=FLAGS,
)  # fmt: skip
_TOP_P = flags.DEFINE_float(
    "top_p", None, "The default nucleus sampling probability of generation.", flag_values=FLAGS
)
_NUM_DOCS = flags.DEFINE_integer(
    "num_docs", None, "The default number of retrieved documents; by default 2, and no more than "
    "fit or were trained.", lower_bound=0, flag_values=FLAGS,
)  # fmt: skip
_LICENCE = flags.DEFINE_multi_string(
    "licence", [], "A licence (SPDX) of the data of parts whose data have no recorded licence; may "
    "be repeated.", flag_values=FLAGS,
)  # fmt: skip
_PROMPT = flags.DEFINE_string(
    "prompt", "", "A prompt for the command of the model card.", flag_values=FLAGS
)
_TITLE = flags.DEFINE_string(
    "title", "", "The heading of the model card; by default the folder's name.", flag_values=FLAGS
)
_NOTES = flags.DEFINE_string(
    "notes", None, "A Markdown file for the end of the model card.", flag_values=FLAGS
)
_DTYPE = flags.DEFINE_enum(
    "dtype", "", ["", "bfloat16"], "bfloat16 stores the decoder's weights in two bytes each; by "
    "default they are as trained.", flag_values=FLAGS,
)  # fmt: skip
_OUT = flags.DEFINE_string(
    "out", None, "The model folder; an older one is replaced.", flag_values=FLAGS
)


def main(argv: list[str]) -> None:
    """Runs `leon export`.

    Raises:
      UserError: parts are missing (the message lists all of them), damaged or do not belong
        together, or the folder cannot be written.
    """
    del argv
    if not _OUT.value:
        raise UserError("--out is missing; for example --out=models/cats")
    if _STEP.value is None:
        if not _AVERAGE.value:
            raise UserError("--noaverage needs --step, for example --step=newest")
        _write(_parts(), storage.path(_OUT.value))
    else:
        _export_checkpoint(_STEP.value, storage.path(_OUT.value))


def _export_checkpoint(step: str, out: pathlib.Path) -> None:
    """Exports the model of a checkpoint of --workdir."""
    import dataclasses
    import tempfile

    if not _WORKDIR.value or _DECODER.value:
        raise UserError(f"--step={step} needs --workdir, whose checkpoint it is, and no --decoder")
    from leon_jax.export import provenance
    from leon_jax.train import programs

    workdir = storage.path(_WORKDIR.value)
    kind = provenance.run_config(workdir).get("kind")
    if kind in ("tokenizer", "encoder"):
        number = programs.save_checkpoint(workdir, step, out, _AVERAGE.value)
        print(f"wrote the {kind} of step {number} into {out}")
        return
    parts = _parts()
    with tempfile.TemporaryDirectory(prefix="leon-") as folder:
        number = programs.save_checkpoint(workdir, step, pathlib.Path(folder), _AVERAGE.value)
        print(f"leon export: the decoder is that of step {number}", file=sys.stderr)
        known = provenance.of_run("decoder", workdir)
        training = known.training | {"steps": number}
        parts = dataclasses.replace(parts, decoder=pathlib.Path(folder, "decoder.safetensors"))
        _write(parts, out, dataclasses.replace(known, training=training))


def _write(parts: "Parts", out: pathlib.Path, decoder: "Provenance | None" = None) -> None:
    """Writes the model folder `out`.

    Args:
      parts: its parts.
      out: the folder.
      decoder: what is known of the decoder; None: what is known of its file.
    """
    from leon_jax.export import write
    from leon_jax.export.parts import NAMES

    if parts.unknown:
        missing = ", ".join(f"--{name} ({NAMES[name]})" for name in parts.unknown)
        hint = "" if _WORKDIR.value else "; or give --workdir, the run of a decoder that names them"
        raise UserError(f"parts of the model are missing: {missing}{hint}")
    parts.check_files({name: f"--{name}" for name in NAMES})
    settings = write.ExportSettings(
        _TITLE.value, _PROMPT.value, _GUIDANCE.value, _TOP_P.value, _NUM_DOCS.value, _licences(),
        _notes(), _COPY_INDEX.value, _DTYPE.value,
    )  # fmt: skip
    folder = write.write(parts, out, settings, decoder)
    assert folder.description is not None
    print(f"wrote the model folder {storage.absolute(out)}")
    if parts.selection is None:
        print(
            "leon export: no selection rules are known for this encoder; measure its thresholds "
            "(docs/retrieval.md) and give them as --selection",
            file=sys.stderr,
        )
    if unknown := folder.description.unknown_licences:
        print(
            f"leon export: the licences of the data of {', '.join(unknown)} are not recorded; name "
            "them with --licence",
            file=sys.stderr,
        )


def _parts() -> "Parts":
    """The parts that the flags and the run of --workdir name."""
    import dataclasses

    from leon_jax.export import parts, provenance

    known = parts.Parts()
    folder = None
    if _WORKDIR.value:
        workdir = storage.path(_WORKDIR.value)
        config = provenance.run_config(workdir)
        if config.get("kind") != "decoder":
            raise UserError(
                f"--workdir={workdir} is the run of kind {config.get('kind')!r}; it must be the "
                "run of a decoder"
            )
        data, export = config.get("data") or {}, workdir / "export"
        decoder, text = export / "decoder.safetensors", export / "text.json"
        if _STEP.value is not None:  # the run may not be finished
            text = text if text.is_file() else storage.path(data.get("text") or "")
        elif not decoder.is_file():
            raise UserError(
                f"--workdir={workdir} has no export/decoder.safetensors; finish the run with leon "
                "train first, or take a checkpoint with --step=newest or --step=best"
            )
        known = dataclasses.replace(parts.of_run(config), decoder=decoder, text=text)
        folder = storage.path(data.get("folder") or "")
    given: dict[str, Any] = {
        name: storage.path(flag.value)
        for name, flag in (
            ("decoder", _DECODER), ("tokenizer", _TOKENIZER), ("text", _TEXT), ("encoder", _ENCODER)
        )
        if flag.value
    }  # fmt: skip
    known = dataclasses.replace(known, **given)
    if _SELECTION.value or "encoder" in given:
        index = storage.path(_INDEX.value) if _INDEX.value else folder
        rules = parts.selection_of(known.encoder, _SELECTION.value, index)
        known = dataclasses.replace(known, selection=rules)
    if _INDEX.value:
        known = dataclasses.replace(known, index=parts.index_of(_INDEX.value))
    return known


def _licences() -> tuple[str, ...]:
    from leon_jax.prepare import licences

    for licence in _LICENCE.value:
        if licences.normal(licence) != licence:
            hint = licences.normal(licence)
            raise UserError(
                f"--licence={licence} is not an SPDX licence expression"
                + (f"; did you mean {hint}?" if hint else "")
            )
    return tuple(_LICENCE.value)


def _notes() -> str:
    if _NOTES.value is None:
        return ""
    try:
        return pathlib.Path(_NOTES.value).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"cannot read --notes={_NOTES.value}: {reason}") from error
