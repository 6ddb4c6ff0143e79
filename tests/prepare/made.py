"""What the tests of preparing ask of a folder."""

import pathlib


def files_of(folder: pathlib.Path) -> dict[str, bytes]:
    """The content of every file of a folder, by path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
