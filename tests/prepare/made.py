"""What the tests of preparing ask of a folder."""

import pathlib


def files_of(folder: pathlib.Path) -> dict[str, bytes]:
    """The content of every file of a folder, by path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def left_beside(folder: pathlib.Path) -> list[str]:
    """What there is beside a prepared folder, but for its lock."""
    known = (folder.name, f".{folder.name}.lock")
    return sorted(path.name for path in folder.parent.iterdir() if path.name not in known)
