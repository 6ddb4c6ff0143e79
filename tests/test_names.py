"""Every name that a function uses is defined or imported.

Linters are told to pass over names in jaxtyping's strings, and then pass over all undefined names.
"""

import ast
import builtins
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    path
    for folder in ("leon_jax", "tests", "benchmarks", "configs", "launch")
    for path in (ROOT / folder).rglob("*.py")
)
KNOWN = {*dir(builtins), "__file__", "__name__"}


def bound_names(tree: ast.AST) -> set[str]:
    """The names that are bound anywhere inside a piece of code."""
    names = set()
    for node in ast.walk(tree):
        match node:
            case ast.Import() | ast.ImportFrom():
                names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
            case ast.FunctionDef() | ast.ClassDef() | ast.AsyncFunctionDef():
                names |= {node.name, *(parameter.name for parameter in node.type_params)}
            case ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store() | ast.Del()):
                names.add(name)
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)):
                names.add(name)
            case ast.MatchStar(name=str(name)) | ast.MatchMapping(rest=str(name)):
                names.add(name)
    return names


def undefined_names(source: str) -> list[str]:
    """`line: name` of names that are bound neither in their own function or class nor outside.

    A name of the outermost level may be bound in any statement of it.
    """
    tree = ast.parse(source)
    inner = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    outer = [node for node in tree.body if node not in inner]
    known = KNOWN.union({node.name for node in inner}, *map(bound_names, outer))
    return [
        f"{node.lineno}: {node.id}"
        for statement in tree.body
        for local in [bound_names(statement)]
        for node in ast.walk(statement)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
        if node.id not in known and node.id not in local
    ]


def test_every_name_is_defined():
    offences = [
        f"{path.relative_to(ROOT)}:{name}"
        for path in SOURCES
        for name in undefined_names(path.read_text(encoding="utf-8"))
    ]
    assert not offences, "\n".join(offences)


def test_an_import_in_another_function_does_not_count():
    source = "def one():\n    import os\n    os.name\n\ndef two():\n    return os.name, missing\n"
    assert set(undefined_names(source)) == {"6: os", "6: missing"}
