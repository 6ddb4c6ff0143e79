"""Converts image-text pairs into a documents folder or a prepared folder.

    plan      list the shards of all sources
    encode    encode each shard into a folder (`shard_encoding.py`), on any machine, in any order
    gather    drop duplicates, hold out documents, number the others, write the final files
    mine      find the neighbours of every document among the documents of train
    finish    write the manifest and the data card, rename the folder to its final name

Without models the shards are not encoded and no neighbours are found: the result is a documents
folder (`leon_jax.data.document_folder`).

All steps write into `.NAME.preparing` beside the folder NAME, which is renamed at the end, so NAME
is complete or does not exist. Each step writes its files atomically and skips files that exist.
A run that was killed therefore resumes where it stopped and produces the same bytes.

If NAME is in a bucket, the shards are encoded into `.NAME.preparing` in the bucket, by any machine.
The other steps work on copies in the cache folder of this machine. Then the files of NAME are
copied to the bucket, manifest.json as the last one.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import jax
from tqdm import tqdm

from leon_jax import storage
from leon_jax.compilation_cache import cache_folder
from leon_jax.config import UserError, to_dict
from leon_jax.data import image_variants
from leon_jax.data.document_folder import DOCUMENTS_FORMAT, MANIFEST
from leon_jax.data.sources.open import open_source
from leon_jax.data.sources.raw_record import ShardedSource, SourceConfig
from leon_jax.documents import Document, Source
from leon_jax.prepare import folder_lock, gather, licences, mining
from leon_jax.prepare.config import DEFAULT_SIDE, TRAIN, PrepareConfig
from leon_jax.prepare.data_card import write_card
from leon_jax.prepare.encoding_models import digest, load_models, matches
from leon_jax.prepare.shard_encoding import Shard, Worker, is_complete, plan
from leon_jax.retrieval.prepared_folder import (
    FORMAT,
    PreparedFolder,
    read_removed,
    write_removed,
)
from leon_jax.retrieval.vector_index import save_rows

Sources = list[tuple[SourceConfig, ShardedSource]]
# Calls `Worker(config, sources, folder)(shard)` for every shard, in this process or elsewhere.
Runner = Callable[[PrepareConfig, Sources, str, Sequence[Shard]], None]

_SETTINGS = "settings.json"
# Settings of the encoding, which a documents folder does not depend on.
_ENCODING = ("max_tokens", "selection", "variants")


def prepare(
    config: PrepareConfig,
    out_dir: str | os.PathLike,
    *,
    sources: Sources | None = None,
    run: Runner | None = None,
    progress: bool = True,
    replace: bool = True,
) -> dict[str, Any]:
    """Prepares a folder, unless it exists and was made from the same inputs and settings.

    The folder is a prepared folder if `config` has models, otherwise a documents folder.

    Args:
      config: the configuration.
      out_dir: the folder to write.
      sources: open sources to use instead of `config.sources`, in the same order.
      run: encodes the shards; by default in this process, one after the other.
      progress: whether to show progress bars.
      replace: whether a prepared folder with other inputs or settings is replaced at the end.

    Returns:
      The manifest.

    Raises:
      UserError: a source or a model file is missing, `out_dir` exists and was not made by `prepare`
        or must not be replaced, the disk is full, or no document of train can be used.
    """
    out = storage.path(out_dir)
    if not storage.is_bucket(out):
        out = out.resolve()
    licences.check_list(config.licences)
    if sources is None:
        sources = [(source, open_source(source)) for source in config.sources]
    shards = plan(sources, config.holds_out)
    expected = settings(config, sources, shards)
    work = folder_lock.beside(_on_disk(out), "preparing")
    manifest = _read_manifest(out)
    if (
        manifest
        and is_up_to_date(manifest, _with_recorded_digests(expected, manifest, config))
        and not work.exists()
    ):
        return manifest
    with folder_lock.hold(out, _on_disk(out)):
        # The process that held the lock before may have prepared the folder.
        manifest = _read_manifest(out)
        if manifest and is_up_to_date(manifest, _with_recorded_digests(expected, manifest, config)):
            _clear(work)
            return manifest
        if out.exists() and manifest is None and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} exists and was not made by leon prepare; choose another path")
        if manifest and not replace:
            raise UserError(
                f"{out} was made with other inputs or settings; choose another folder, or remove "
                "this one with all that was made from it"
            )
        if manifest and progress:
            print(f"{out} was made with other inputs or settings; replacing it", file=sys.stderr)
        try:
            removed = read_removed(out)
            recorded = _begin(work, expected, config)
            return _resume(config, out, work, recorded, sources, shards, removed, run, progress)
        except OSError as error:
            reason = storage.reason(error) or "the file system refuses it"
            raise UserError(
                f"preparing {out} failed: {reason} ({error.filename or work}); "
                "finished work remains, so run the same command again"
            ) from error


def _resume(
    config: PrepareConfig,
    out: pathlib.Path,
    work: pathlib.Path,
    recorded: dict[str, Any],
    sources: Sources,
    shards: Sequence[Shard],
    removed: Collection[tuple[str, str]],
    run: Runner | None,
    progress: bool,
) -> dict[str, Any]:
    """Runs the remaining steps, renames the folder to `out` and returns its manifest."""
    # A worker may outlive a killed run with other settings; it must not write into this folder.
    settings_digest = hashlib.sha256(json.dumps(recorded).encode()).hexdigest()[:16]
    # The gathered files also depend on the removed keys.
    removed_digest = hashlib.sha256(json.dumps(sorted(removed)).encode()).hexdigest()[:16]
    parts, final = work / f"shards-{settings_digest}", work / f"prepared-{removed_digest}"
    for folder in (parts, final):
        folder.mkdir(exist_ok=True)
        for path in folder.glob(".*"):  # incomplete files of a killed run
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    # Where the shards are encoded; in a bucket, so that any machine can do it.
    encoded = parts
    if storage.is_bucket(out):
        encoded = folder_lock.beside(out, "preparing") / parts.name
    remaining = [shard for shard in shards if not is_complete(encoded / shard.name)]
    if remaining:
        (run or in_process(progress))(config, sources, str(encoded), remaining)
    if encoded != parts:
        storage.download(encoded, parts)
    manifest = recorded | gather.gather(config, parts, shards, final, removed)
    write_removed(final, removed)
    _write(final / MANIFEST, manifest)
    # The images of an encoding are in the documents folder around it.
    address = out if storage.is_bucket(out) else None
    if config.has_models:
        mining.mine(config, PreparedFolder(final), parts, progress)
        if config.variants > 1:
            _encode_variants(config, PreparedFolder(final, address), progress)
    write_card(final, address)
    if storage.is_bucket(out):
        storage.upload(final, out, MANIFEST)
        storage.remove(encoded.parent)
    else:
        folder_lock.replace(out, final)
    _clear(work)
    return manifest


def in_process(progress: bool = True) -> Runner:
    """Returns a runner that encodes shards in this process, one after the other.

    Each shard uses all cores and local devices.
    """

    def run(config: PrepareConfig, sources: Sources, folder: str, shards: Sequence[Shard]) -> None:
        bar = tqdm(shards, desc="shards", unit="shard", disable=not progress)
        counts = {"documents": 0, "rejects": 0}

        def report(documents: int, rejects: int) -> None:
            counts["documents"] += documents
            counts["rejects"] += rejects
            bar.set_postfix(counts)

        worker = Worker(config, sources, folder, report)
        for shard in bar:
            worker(shard)

    return run


def settings(config: PrepareConfig, sources: Sources, shards: Iterable[Shard]) -> dict[str, Any]:
    """Returns the part of the manifest that determines the folder's content.

    Returns:
      `format`, `config`, `sha256` (the digests of the models) and `inputs` (for each shard its
      source, name and version).
    """
    paths, values = _model_paths(config), to_dict(config)
    # The digests identify the models; their paths do not matter.
    ignored = {"tokenizer", "encoder", "text"}
    # Only settings that matter, so that others can change without a new folder.
    ignored |= {"held_out"} if config.has_models else {*_ENCODING}
    if not config.has_models:
        values["duplicates"] = {"exact": config.duplicates.exact}
        values["picture_side"] = config.picture_side or DEFAULT_SIDE
    values = {name: value for name, value in values.items() if name not in ignored}
    if config.pixels:  # older folders do not have this setting
        del values["pixels"]
    for source in values["sources"]:
        if not source["caption_from_name"]:  # older folders do not have this setting
            del source["caption_from_name"]
    return {
        "format": FORMAT if config.has_models else DOCUMENTS_FORMAT,
        "config": json.loads(json.dumps(values)),
        "sha256": {name: digest(path) for name, path in paths.items()},
        "inputs": {
            shard.name: {
                "source": shard.source,
                "shard": shard.shard,
                "version": sources[shard.source][1].version(shard.shard),
            }
            for shard in shards
        },
    }


def _model_paths(config: PrepareConfig) -> dict[str, str]:
    if not config.has_models:
        return {}
    return {"tokenizer": config.tokenizer, "encoder": config.encoder, "text": config.text}


def _with_recorded_digests(
    expected: dict[str, Any], recorded: dict[str, Any], config: PrepareConfig
) -> dict[str, Any]:
    """Returns `expected` with the digests of `recorded`, if they belong to the same models.

    A folder of an older version records digests of the bytes of weight files. It remains valid.
    """
    digests, paths = recorded["sha256"], _model_paths(config)
    if isinstance(digests, dict) and all(
        matches(path, digests.get(name)) for name, path in paths.items()
    ):
        return expected | {"sha256": digests}
    return expected


def is_up_to_date(manifest: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Tells whether a folder has the expected settings, or those and more variants.

    Args:
      manifest: the manifest of the folder.
      expected: as `settings` returns it.
    """
    if manifest.get("format") != expected["format"]:
        return False
    if "variants" not in expected["config"]:
        return all(manifest.get(name) == value for name, value in expected.items())
    variants = expected["config"]["variants"]
    adjusted = {**manifest, "config": {**manifest["config"], "variants": variants}}
    return manifest["config"].get("variants", 0) >= variants and all(
        adjusted.get(name) == value for name, value in expected.items()
    )


def _encode_variants(config: PrepareConfig, prepared: PreparedFolder, progress: bool) -> None:
    """Writes the image codes of every variant of all train images."""
    models = load_models(config.tokenizer, config.encoder, config.text)
    records, start = prepared.records(TRAIN), 0
    with jax.set_mesh(models.mesh):
        shards = prepared.shards(TRAIN)
        for shard, count in tqdm(shards.items(), desc="variants", disable=not progress):
            path = prepared.folder / f"{shard}.variants.npy"
            if not path.exists():
                documents = _Range(records, start, count)
                label = f"variants of {shard}" if progress else None
                save_rows(
                    path, image_variants.encode(documents, models.tokenizer, config.variants, label)
                )
            start += count


@dataclasses.dataclass(frozen=True)
class _Range:
    """A range of the documents of a source."""

    source: Source
    start: int
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Document:
        return self.source[self.start + index]


def _begin(work: pathlib.Path, expected: dict[str, Any], config: PrepareConfig) -> dict[str, Any]:
    """Creates the working folder, or keeps an existing one with the same settings.

    A working folder with other settings is deleted.

    Returns:
      The settings to continue with: `expected`, or the same settings as an older version wrote
      them.
    """
    path = work / _SETTINGS
    try:
        recorded = json.loads(path.read_text())
        if recorded == _with_recorded_digests(expected, recorded, config):
            return recorded
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # the file is missing, or a killed run left it incomplete
    _clear(work)
    work.mkdir()
    _write(path, expected)
    return expected


def _clear(work: pathlib.Path) -> None:
    """Removes the working folder, the settings first: no run resumes a half-removed folder."""
    (work / _SETTINGS).unlink(missing_ok=True)
    if work.exists():
        shutil.rmtree(work)


def _on_disk(out: pathlib.Path) -> pathlib.Path:
    """Returns `out`, or the path of its copy in the cache folder if it is in a bucket."""
    if not storage.is_bucket(out):
        return out
    digest = hashlib.sha256(str(out).encode()).hexdigest()[:16]
    return cache_folder() / "preparing" / digest / out.name


def _read_manifest(out: pathlib.Path) -> dict[str, Any] | None:
    """Reads the manifest of a folder of `prepare`, of any version; None if there is none."""
    try:
        manifest = json.loads((out / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    valid = isinstance(manifest, dict) and {"format", "splits", "sha256"} <= set(manifest)
    is_ours = valid and (manifest["sha256"] or manifest["format"] == DOCUMENTS_FORMAT)
    return manifest if is_ours else None


def _write(path: pathlib.Path, value: Any) -> None:
    storage.write(path, json.dumps(value, indent=1) + "\n")
