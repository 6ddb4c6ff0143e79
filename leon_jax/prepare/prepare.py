"""`leon prepare`: from sources to the folder that training and retrieval read.

    plan      the shards of all sources
    shards    each becomes a folder of encoded documents (`shard.py`): anywhere, in any order
    gather    what repeats is dropped, the rest is numbered and put in its final place
    mine      every document's neighbours are found among those of train
    finish    manifest and data card; the folder appears under its name

Everything is made in `.NAME.preparing` beside the folder NAME and moved there at the end, so NAME
is complete or not there. Each step leaves files that are whole, and what is there is not made
again: a run that was killed goes on where it stopped, and ends with the same bytes.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from leon_jax import sharding
from leon_jax.config import UserError, to_dict
from leon_jax.data import image_variants
from leon_jax.data.records import RecordSource
from leon_jax.data.sources.open import open_source
from leon_jax.data.sources.raw_record import Shards, SourceConfig
from leon_jax.prepare import folder_lock, gather, licences
from leon_jax.prepare.config import TRAIN, PrepareConfig
from leon_jax.prepare.data_card import write_card
from leon_jax.prepare.encoding_models import digest, load_models, matches
from leon_jax.prepare.shard_encoding import Shard, Worker, plan
from leon_jax.retrieval.mining import PASS
from leon_jax.retrieval.neighbour_table import row_type
from leon_jax.retrieval.prepared_folder import (
    FORMAT,
    MANIFEST,
    PreparedFolder,
    read_removed,
    write_removed,
)
from leon_jax.retrieval.selection import SelectionConfig, find_neighbours
from leon_jax.retrieval.vector_index import VectorIndex, save_rows

Sources = list[tuple[SourceConfig, Shards]]
# Does `Worker(config, sources, folder)(shard)` for every shard, somewhere.
Runner = Callable[[PrepareConfig, Sources, str, Sequence[Shard]], None]

_SETTINGS = "settings.json"


def prepare(
    config: PrepareConfig,
    out_dir: str | os.PathLike,
    *,
    sources: Sources | None = None,
    run: Runner | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Prepares a folder, unless it is there and made from the same things.

    Args:
      config: what to do.
      out_dir: the folder; an older one with other inputs is replaced in the end.
      sources: opened ones instead of those that `config.sources` names, in that order.
      run: does the shards; by default here, one after the other.
      progress: whether to show progress bars.

    Returns:
      The manifest.

    Raises:
      UserError: a source or a model file is missing, `out_dir` is in the way, the disk is full, or
        nothing is left of train.
    """
    out = pathlib.Path(out_dir).resolve()
    licences.check_list(config.licences)
    if sources is None:
        sources = [(source, open_source(source)) for source in config.sources]
    shards = plan(sources)
    wanted = settings(config, sources, shards)
    work = folder_lock.beside(out, "preparing")
    made = _made(out)
    if made and serves(made, _as_recorded(wanted, made, config)) and not work.exists():
        return made
    with folder_lock.hold(out):
        made = _made(out)
        # A process that held the folder before may have made it.
        if made and serves(made, _as_recorded(wanted, made, config)):
            _clear(work)
            return made
        if out.exists() and made is None and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} is in the way: it is not a prepared folder")
        if made and progress:
            print(f"{out} was made from other things; this will replace it", file=sys.stderr)
        try:
            removed = read_removed(out)
            wanted = _begin(work, wanted, config)
            return _fill(config, out, work, wanted, sources, shards, removed, run, progress)
        except OSError as error:
            reason = error.strerror or "the file system refuses it"
            raise UserError(
                f"preparing {out} stopped: {reason} ({error.filename or work}); "
                "what is done is kept, so give the same command again"
            ) from error


def _fill(
    config: PrepareConfig,
    out: pathlib.Path,
    work: pathlib.Path,
    wanted: dict[str, Any],
    sources: Sources,
    shards: Sequence[Shard],
    removed: Collection[tuple[str, str]],
    run: Runner | None,
    progress: bool,
) -> dict[str, Any]:
    """Does what is not done yet, and puts the folder in place."""
    # A worker that outlived a killed run with other settings writes into a folder of its own.
    name = hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:16]
    # What is gathered depends on what was removed as well.
    left = hashlib.sha256(json.dumps(sorted(removed)).encode()).hexdigest()[:16]
    parts, final = work / f"shards-{name}", work / f"prepared-{left}"
    for folder in (parts, final):
        folder.mkdir(exist_ok=True)
        for path in folder.glob(".*"):  # half-written by a run that was killed
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    todo = [shard for shard in shards if not (parts / shard.name).is_dir()]
    if todo:
        (run or in_process(progress))(config, sources, str(parts), todo)
    manifest = wanted | gather.gather(config, parts, shards, final, removed)
    write_removed(final, removed)
    _write(final / MANIFEST, manifest)
    _mine(config, PreparedFolder(final), parts, progress)
    if config.variants > 1:
        _encode_variants(config, PreparedFolder(final), progress)
    write_card(final)
    folder_lock.replace(out, final)
    _clear(work)
    return manifest


def in_process(progress: bool = True) -> Runner:
    """Does the shards here, one after the other; each uses all cores and devices."""

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
    """What decides the folder's content: the beginning of its manifest."""
    paths, values = _model_paths(config), to_dict(config)
    # Where files lie says nothing; the digests do.
    for name in paths:
        del values[name]
    return {
        "format": FORMAT,
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
    return {"tokenizer": config.tokenizer, "encoder": config.encoder, "text": config.text}


def _as_recorded(
    wanted: dict[str, Any], recorded: dict[str, Any], config: PrepareConfig
) -> dict[str, Any]:
    """`wanted` with the digests that a folder records, if they mean the same models.

    A folder of an older version records digests of bytes; it stays one that is wanted.
    """
    digests, paths = recorded["sha256"], _model_paths(config)
    if isinstance(digests, dict) and all(
        matches(path, digests.get(name)) for name, path in paths.items()
    ):
        return wanted | {"sha256": digests}
    return wanted


def serves(made: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether a prepared folder is what is wanted, or that and more variants."""
    if made.get("format") != FORMAT:
        return False
    have, want = made["config"].get("variants", 0), wanted["config"]["variants"]
    same = {**made, "config": {**made["config"], "variants": want}}
    return have >= want and all(same.get(name) == value for name, value in wanted.items())


def _mine(
    config: PrepareConfig, prepared: PreparedFolder, parts: pathlib.Path, progress: bool
) -> None:
    """Writes the neighbour tables of all splits."""
    bank, pictures = prepared.vector_index(), gather.pictures(parts, prepared.shards(TRAIN))
    selection = config.selection
    sources = gather.source_numbers(prepared) if selection.alternate_sources else None
    total = sum(prepared.manifest["splits"].values())
    with (
        tqdm(total=total, desc="neighbours", unit="doc", disable=not progress) as bar,
        jax.set_mesh(sharding.make_mesh()),
    ):
        for split in prepared.manifest["splits"]:
            start = 0
            for group in _groups(prepared.shards(split)):
                paths = {name: prepared.folder / f"{name}.neighbours.npy" for name in group}
                count = sum(group.values())
                if not all(path.exists() for path in paths.values()):
                    each = [gather.queries(parts, name) for name in group]
                    queries = {view: np.concatenate([q[view] for q in each]) for view in each[0]}
                    own = np.arange(start, start + count, dtype=np.int32)
                    table = neighbour_rows(
                        queries, bank, pictures, selection, own if split == TRAIN else None, sources
                    )
                    ends = np.cumsum([0, *group.values()])
                    for path, low, high in zip(paths.values(), ends, ends[1:], strict=False):
                        save_rows(path, table[low:high])
                start += count
                bar.update(count)


def _groups(shards: dict[str, int]) -> Iterator[dict[str, int]]:
    """Shards, and how many documents each has, that search while the bank passes by once."""
    group: dict[str, int] = {}
    for name, count in shards.items():
        if group and sum(group.values()) + count > PASS:
            yield group
            group = {}
        group[name] = count
    if group:
        yield group


def _encode_variants(config: PrepareConfig, prepared: PreparedFolder, progress: bool) -> None:
    """Writes the codes of all train pictures in every variant."""
    models = load_models(config.tokenizer, config.encoder, config.text)
    with jax.set_mesh(models.mesh):
        for shard in tqdm(prepared.shards(TRAIN), desc="variants", disable=not progress):
            path = prepared.folder / f"{shard}.variants.npy"
            if not path.exists():
                documents = RecordSource(prepared.folder / f"{shard}.array_record")
                label = f"variants of {shard}" if progress else None
                save_rows(
                    path, image_variants.encode(documents, models.tokenizer, config.variants, label)
                )


def neighbour_rows(
    queries: dict[str, np.ndarray],
    bank: VectorIndex,
    pictures: VectorIndex,
    selection: SelectionConfig,
    own: np.ndarray | None,
    sources: np.ndarray | None,
) -> np.ndarray:
    """The table of some queries: what each finds, by modality, in the bank."""
    count = len(queries["text"])
    table = np.zeros(count, row_type(selection.per_modality))
    views: tuple[str, ...] = ("text", "image")
    if not selection.through_parts:
        views = ("document",)
        selection = dataclasses.replace(selection, per_modality=2 * selection.per_modality)
    for start in range(0, count, PASS):
        rows = slice(start, start + PASS)
        for view in views:
            ids, scores = find_neighbours(
                queries[view][rows],
                bank,
                selection,
                documents=queries["document"][rows],
                images=(pictures, queries["image"][rows]),
                query_ids=None if own is None else own[rows],
                sources=sources,
            )
            # What the whole document finds is dealt out to both halves of the table in turn.
            halves = (view,) if view != "document" else ("text", "image")
            for offset, half in enumerate(halves):
                table[f"by_{half}_ids"][rows] = ids[:, offset :: len(halves)]
                table[f"by_{half}_scores"][rows] = scores[:, offset :: len(halves)]
    return table


def _begin(work: pathlib.Path, wanted: dict[str, Any], config: PrepareConfig) -> dict[str, Any]:
    """Makes the working folder ready; what was begun with other settings is thrown away.

    Returns:
      The settings to go on with: `wanted`, or as an older version wrote them.
    """
    path = work / _SETTINGS
    try:
        begun = json.loads(path.read_text())
        if begun == _as_recorded(wanted, begun, config):
            return begun
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # there is nothing, or what a killed run left half written
    _clear(work)
    work.mkdir()
    _write(path, wanted)
    return wanted


def _clear(work: pathlib.Path) -> None:
    """Removes the working folder, its settings first: no run goes on with what is half removed."""
    (work / _SETTINGS).unlink(missing_ok=True)
    if work.exists():
        shutil.rmtree(work)


def _made(out: pathlib.Path) -> dict[str, Any] | None:
    """The manifest of a prepared folder of any version; None if there is none."""
    try:
        manifest = json.loads((out / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    ours = isinstance(manifest, dict) and {"format", "splits", "sha256"} <= set(manifest)
    return manifest if ours and manifest["sha256"] else None


def _write(path: pathlib.Path, value: Any) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)
