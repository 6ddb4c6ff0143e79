"""The files of a model folder, by flags or by the configuration of a decoder's training run."""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from leon_jax import config as configs
from leon_jax import storage
from leon_jax.config import UserError
from leon_jax.export.provenance import EXPORT
from leon_jax.model_description import IndexAddress
from leon_jax.model_folder import ENCODERS, SELECTION
from leon_jax.prepare.encoding_models import matches
from leon_jax.retrieval.neighbour_selection import SelectionConfig
from leon_jax.retrieval.prepared_folder import read_manifest

# Names of the parts, and what each is in a sentence.
NAMES = {
    "decoder": "the decoder, decoder.safetensors",
    "tokenizer": "the image tokenizer, tokenizer.safetensors",
    "text": "the text tokenizer, text.json",
    "encoder": "the retrieval encoder, encoder.safetensors or a CLIP folder",
}
# The value of --index for the emoji documents.
DEMO_INDEX = "prepare:demo"


@dataclasses.dataclass(frozen=True)
class Parts:
    """The files that become a model folder.

    Attributes:
      decoder, tokenizer, text, encoder: their paths; None: not known.
      selection: the selection rules of the encoder, fields of `SelectionConfig`; None: not known.
      index: where the documents are.
    """

    decoder: pathlib.Path | None = None
    tokenizer: pathlib.Path | None = None
    text: pathlib.Path | None = None
    encoder: pathlib.Path | None = None
    selection: dict[str, Any] | None = None
    index: IndexAddress = dataclasses.field(default_factory=IndexAddress)

    def path(self, name: str) -> pathlib.Path:
        """Returns the path of a part that is known."""
        path = getattr(self, name)
        assert path is not None
        return path

    @property
    def unknown(self) -> list[str]:
        """Names of the parts that are not known."""
        return [name for name in NAMES if getattr(self, name) is None]

    def check_files(self, keys: Mapping[str, str]) -> None:
        """Checks that known parts exist.

        Args:
          keys: the flag or key of each part to check, for messages.

        Raises:
          UserError: files are missing; the message lists all of them.
        """
        missing = [
            f"{keys[name]} names {path}"
            for name in keys
            if (path := getattr(self, name)) is not None
            and not (path.is_file() or (name == "encoder" and path.is_dir()))
        ]
        if missing:
            raise UserError(f"these files do not exist: {', '.join(missing)}")


def of_run(config: Mapping[str, Any]) -> Parts:
    """Returns the parts that the configuration of a decoder's run names.

    The image tokenizer is `export.tokenizer`, or else `samples.image`. What `export` does not name
    is looked for by the digests in the manifest of the prepared folder that the run reads: beside
    the tokenizers, and in the runs beside the tokenizers' runs. So only the very files that made
    the data are found. The rules and the index are those of the prepared folder then.

    Args:
      config: the configuration as plain values.

    Returns:
      The parts, without `decoder` and `text`, which the run itself writes.

    Raises:
      UserError: `export.selection` or `export.index` cannot be read; or the image tokenizer is
        another one than the tokenizer that made the prepared folder.
    """
    named, data = config.get("export") or {}, config.get("data") or {}
    folders = [data.get("folder"), *(each.get("folder") for each in data.get("mixture") or ())]
    folder = storage.path(next(filter(None, folders), ""))
    recorded = _manifest(folder).get("sha256") or {}
    text = _path(data.get("text"))
    tokenizer = _path(named.get("tokenizer") or (config.get("samples") or {}).get("image"))
    tokenizer = tokenizer or _search("tokenizer", recorded, [text])
    if tokenizer and _is_another("tokenizer", tokenizer, recorded):
        raise UserError(
            f"{folder} was prepared with another image tokenizer than {tokenizer}; set "
            "config.samples.image and config.export.tokenizer to the one that made the codes"
        )
    encoder = _path(named.get("encoder")) or _search("encoder", recorded, [tokenizer, text])
    files = {"tokenizer": tokenizer, "encoder": encoder, "text": text}
    is_index = bool(data.get("folder")) and all(
        path is not None and _is_same(kind, path, recorded) for kind, path in files.items()
    )
    return Parts(
        tokenizer=tokenizer,
        encoder=encoder,
        selection=selection_of(encoder, named.get("selection") or None, folder),
        index=index_of(named.get("index") or (str(folder) if is_index else None)),
    )


def selection_of(
    encoder: pathlib.Path | None, path: str | None, folder: pathlib.Path | None = None
) -> dict[str, Any] | None:
    """Returns the selection rules of an encoder.

    Args:
      encoder: the encoder.
      path: a file with the rules; None: `selection.json` beside the encoder or, if the encoder is
        a folder, in it or beside it; or else the rules of `folder`.
      folder: a prepared folder. Its rules are taken only if it was made with this encoder.

    Returns:
      Fields of `SelectionConfig`; None: no rules are known for this encoder.

    Raises:
      UserError: the file cannot be read, or has an unknown or wrong value.
    """
    candidates = [storage.path(path)] if path else []
    if encoder is not None and not path:
        candidates = [encoder / SELECTION, encoder.parent / SELECTION]
    for candidate in candidates:
        if path or candidate.is_file():
            return _read_selection(candidate)
    manifest = _manifest(folder)
    recorded, rules = manifest.get("sha256") or {}, (manifest.get("config") or {}).get("selection")
    if rules and encoder is not None and _is_same("encoder", encoder, recorded):
        return rules
    return None


def index_of(value: str | None) -> IndexAddress:
    """Returns the address that a flag or key names: a prepared folder, or `DEMO_INDEX`.

    Raises:
      UserError: it is not a prepared folder.
    """
    if not value:
        return IndexAddress()
    if value == DEMO_INDEX:
        return IndexAddress(prepare="demo")
    read_manifest(storage.path(value))
    return IndexAddress(folder=str(storage.absolute(value)))


def _read_selection(path: pathlib.Path) -> dict[str, Any]:
    try:
        rules = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the selection rules {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"the selection rules {path} are not JSON in UTF-8: {error}") from error
    configs.build(SelectionConfig, rules, str(path))
    return rules


def _manifest(folder: pathlib.Path | None) -> dict[str, Any]:
    """Returns the manifest of a prepared folder; empty if it is none."""
    if folder is None or folder == pathlib.Path():
        return {}
    try:
        return read_manifest(folder)
    except UserError:
        return {}


def _path(value: str | None) -> pathlib.Path | None:
    return storage.path(value) if value else None


def _search(
    kind: str, recorded: Mapping[str, str], neighbours: Iterable[pathlib.Path | None]
) -> pathlib.Path | None:
    """Returns the file of a kind with the recorded digest, near other files; None: there is none.

    Args:
      kind: "tokenizer" or "encoder".
      recorded: the digest of each kind.
      neighbours: files beside which, or beside whose runs, the file may be.
    """
    if not recorded.get(kind):
        return None
    names = ENCODERS if kind == "encoder" else (f"{kind}.safetensors",)
    candidates: dict[pathlib.Path, None] = {}
    for path in filter(None, neighbours):
        candidates |= dict.fromkeys(path.parent / name for name in names)
        if path.parent.name == EXPORT:
            runs = path.parent.parent.parent
            candidates |= dict.fromkeys(sorted(runs.glob(f"*/{EXPORT}/{names[0]}")))
    return next((path for path in candidates if _is_same(kind, path, recorded)), None)


def _is_same(kind: str, path: pathlib.Path, recorded: Mapping[str, str]) -> bool:
    if not path.exists():
        return False
    try:
        return matches(path, recorded.get(kind))
    except UserError:  # it cannot be read
        return False


def _is_another(kind: str, path: pathlib.Path, recorded: Mapping[str, str]) -> bool:
    """Returns whether a file that exists is another one than the recorded one."""
    return bool(recorded.get(kind)) and path.exists() and not _is_same(kind, path, recorded)
