"""Helpers that prepare small folders and list their files."""

import pathlib

from leon_jax.prepare import prepare as preparing
from leon_jax.retrieval.neighbour_selection import SelectionConfig
from tests import tiny

NEVER_NEAR = SelectionConfig(near_copy_query=2, near_copy_document=2, near_copy_picture=None)


def files_of(folder: pathlib.Path) -> dict[str, bytes]:
    """The content of every file of a folder, by path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def files_beside(folder: pathlib.Path) -> list[str]:
    """The names of all files beside a prepared folder except its lock."""
    expected = (folder.name, f".{folder.name}.lock")
    return sorted(path.name for path in folder.parent.iterdir() if path.name not in expected)


def splits():
    documents = tiny.documents()
    return {"train": documents[:8], "unseen": documents[8:]}


def make(checkpoint, out, sources=None, run=None, **changes):
    changes = {"selection": NEVER_NEAR, **changes}
    config, opened = tiny.preparation(checkpoint, sources or splits(), shard_size=3, **changes)
    return preparing.prepare(config, out, sources=opened, run=run, progress=False)
