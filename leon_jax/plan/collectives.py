"""What a compiled TPU program sends between devices, read from its HLO text.

A collective in a loop runs once an iteration. XLA's loops count from zero up to a constant that
stands in their condition, so what a scan over layers sends is counted for every layer, and so are
the rings of permutes that XLA puts in place of an all-gather or a reduce-scatter beside a matrix
product. A reduce-scatter that XLA makes of an all-reduce and a slice is a computation named for
both (`all-reduce-scatter`) and counts as what it is. Of the branches of a conditional the longest
one counts. An asynchronous collective stands in the text
two or three times (start, what runs meanwhile, done) under one channel id, and is counted as often
as the piece that runs least.
"""

import dataclasses
import math
import re
from collections import defaultdict

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

_BYTES = {"pred": 1, "bf16": 2, "f8e4m3fn": 1, "f8e5m2": 1}  # others say it: s32, f16, u8
_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) \(")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%[\w.\-]+ = (.*?) ([a-z][a-z\-]*)\((.*)$")
_CALLED = re.compile(r"\b(?:calls|body|condition|to_apply)=%([\w.\-]+)")
_BRANCHES = re.compile(
    r"\b(?:branch_computations=\{|(?:true|false)_computation=)([^}]*?)(?:\}|,|$)"
)
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_LIMIT = re.compile(r"\bconstant\((\d+)\)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of collective in one execution of a program.

    Attributes:
      instructions: how often it stands in the program.
      runs: how often it runs.
      bytes_sent: what one device sends in all of them, by the ring algorithms.
    """

    instructions: int = 0
    runs: int = 0
    bytes_sent: float = 0.0


def collectives(hlo: str, iterations: int = 1) -> dict[str, Collective]:
    """What one device sends in one execution of the program, by kind of `KINDS`.

    Args:
      hlo: the compiled program.
      iterations: of loops that end when the data say so.
    """
    bodies, entry = _computations(hlo)
    runs: dict[str, int] = defaultdict(int)
    _walk(entry, 1, bodies, runs, iterations)
    # By what all pieces of one collective share -> (runs, bytes).
    found: dict[tuple[str, str, str, int], tuple[int, float]] = {}
    for name, lines in bodies.items():
        for number, (shape, opcode, rest) in enumerate(lines):
            kind = opcode.removesuffix("-start")
            if kind not in KINDS or not runs[name]:
                continue
            channel = re.search(r"\bchannel_id=(\d+)", rest)
            group = _group(rest)
            size = _bytes(shape, opcode.endswith("-start"))
            if name.startswith("all-reduce-scatter"):
                kind, size = "reduce-scatter", size / group
            plain = re.sub(r"\{[^}]*\}", "", shape)  # without layouts, which differ
            key = kind, channel[1] if channel else f"{name} {number}", plain, group
            once = runs[name], _sent(kind, size, group) * runs[name]
            # What runs meanwhile may be a loop, with a piece in each iteration.
            found[key] = min(found.get(key, once), once)
    totals = {}
    for kind in KINDS:
        chosen = [value for key, value in found.items() if key[0] == kind]
        totals[kind] = Collective(len(chosen), sum(n for n, _ in chosen), sum(b for _, b in chosen))
    return totals


def _computations(hlo: str) -> tuple[dict[str, list[tuple[str, str, str]]], str]:
    """Instructions (shape, opcode, rest of the line) by computation, and the entry's name."""
    bodies: dict[str, list[tuple[str, str, str]]] = {}
    entry = current = ""
    for line in hlo.splitlines():
        if head := _COMPUTATION.match(line):
            current = head[2]
            bodies[current] = []
            entry = current if head[1] else entry
        elif current and (found := _INSTRUCTION.match(line)):
            bodies[current].append((found[1], found[2], found[3]))
    return bodies, entry


def _walk(name: str, times: int, bodies: dict, runs: dict[str, int], iterations: int) -> None:
    """Adds how often a computation and those it calls run."""
    runs[name] += times
    for _, opcode, rest in bodies.get(name, ()):
        called = _CALLED.findall(rest)
        if branches := _branches(rest):
            called.append(max(branches, key=lambda branch: _length(branch, bodies)))
        trips = _trips(rest, bodies, iterations) if opcode == "while" else 1
        for inner in called:
            _walk(inner, times * trips, bodies, runs, iterations)


def _branches(rest: str) -> list[str]:
    """The computations that a conditional chooses from."""
    return [name for found in _BRANCHES.findall(rest) for name in re.findall(r"%([\w.\-]+)", found)]


def _length(name: str, bodies: dict) -> int:
    """Instructions of a computation and of those it calls."""
    lines = bodies.get(name, ())
    called = [inner for _, _, rest in lines for inner in (*_CALLED.findall(rest), *_branches(rest))]
    return len(lines) + sum(_length(inner, bodies) for inner in called)


def _trips(rest: str, bodies: dict, iterations: int) -> int:
    """Iterations of a loop: what its condition compares with; `iterations` where data decide."""
    condition = re.search(r"\bcondition=%([\w.\-]+)", rest)
    lines = bodies.get(condition[1], ()) if condition else ()
    limits = [_LIMIT.search(f"{opcode}({after}") for _, opcode, after in lines]
    known = [int(limit[1]) for limit in limits if limit]
    return max(known, default=iterations)


def _bytes(shape: str, started: bool) -> float:
    """Size of a result. That of a start holds its operands, too: the largest part counts."""
    sizes = []
    for kind, axes in _SHAPE.findall(shape):
        digits = re.search(r"\d+$", kind)
        width = _BYTES.get(kind, int(digits[0]) / 8 if digits else 4)
        sizes.append(width * math.prod(int(n) for n in axes.split(",") if n))
    return (max(sizes) if started else sum(sizes)) if sizes else 0.0


def _group(rest: str) -> int:
    """How many devices take part in one collective; XLA writes it in three ways."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", found[2]))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(found[1].split(","))
    return 2


def _sent(kind: str, size: float, group: int) -> float:
    """Bytes one device sends round a ring; `size` is that of the result."""
    match kind:
        case "all-reduce":
            return 2 * size * (group - 1) / group
        case "reduce-scatter":
            return size * (group - 1)
        case "collective-permute":
            return size
        case _:
            return size * (group - 1) / group
