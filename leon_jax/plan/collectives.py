"""Counts the collectives of a compiled TPU program from its HLO text.

- Loops: a collective in a loop runs once per iteration. XLA's loops count from zero to a constant
  in their condition. So a scan over layers counts once per layer, and so do the rings of permutes
  that XLA uses instead of an all-gather or a reduce-scatter next to a matrix product.
- Fusions: XLA writes some reduce-scatters as a computation `all-reduce-scatter` with an all-reduce
  and a slice. It counts as a reduce-scatter.
- Conditionals: only the longest branch counts.
- Asynchronous collectives: they occur two or three times in the text (start, overlapped work, done)
  with the same channel id, and run as often as the piece with the fewest runs. Or they occur once,
  as a start, or on a SparseCore.
"""

import dataclasses
import math
import re
from collections import defaultdict

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

_BYTES = {
    "pred": 1,
    "bf16": 2,
    "f8e4m3fn": 1,
    "f8e5m2": 1,
}  # other names end in the number of bits: s32, f16, u8
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
    """Counts of one kind of collective in one execution of a program.

    Attributes:
      instructions: number of instructions in the program.
      runs: number of executions.
      bytes_sent: bytes that one device sends in all executions, with ring algorithms.
      asynchronous: number of instructions that run at the same time as other work.
    """

    instructions: int = 0
    runs: int = 0
    bytes_sent: float = 0.0
    asynchronous: int = 0


def collectives(hlo: str, iterations: int = 1) -> dict[str, Collective]:
    """Counts the collectives of one execution of a program, by kind of `KINDS`.

    Args:
      hlo: the text of the compiled program.
      iterations: assumed iterations of loops whose end depends on data.
    """
    bodies, entry = _computations(hlo)
    runs: dict[str, int] = defaultdict(int)
    _count_runs(entry, 1, bodies, runs, iterations)
    # (runs, bytes) of each collective; the key is what all its pieces have in common.
    counts: dict[tuple[str, str, str, int], tuple[int, float]] = {}
    asynchronous = set()
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
            plain_shape = re.sub(r"\{[^}]*\}", "", shape)  # layouts may differ between pieces
            key = kind, channel[1] if channel else f"{name} {number}", plain_shape, group
            count = runs[name], _sent(kind, size, group) * runs[name]
            if opcode.endswith("-start") or "DEVICE_TYPE_SPARSECORE" in rest or key in counts:
                asynchronous.add(key)
            # The overlapped work may be a loop with a piece in each iteration.
            counts[key] = min(counts.get(key, count), count)
    totals = {}
    for kind in KINDS:
        values = [count for key, count in counts.items() if key[0] == kind]
        totals[kind] = Collective(
            len(values),
            sum(n for n, _ in values),
            sum(b for _, b in values),
            sum(key[0] == kind for key in asynchronous),
        )
    return totals


def _computations(hlo: str) -> tuple[dict[str, list[tuple[str, str, str]]], str]:
    """Parses the instructions (shape, opcode, rest of the line) of each computation.

    Returns:
      The instructions by computation, and the name of the entry computation.
    """
    bodies: dict[str, list[tuple[str, str, str]]] = {}
    entry = current = ""
    for line in hlo.splitlines():
        if head := _COMPUTATION.match(line):
            current = head[2]
            bodies[current] = []
            entry = current if head[1] else entry
        elif current and (match := _INSTRUCTION.match(line)):
            bodies[current].append((match[1], match[2], match[3]))
    return bodies, entry


def _count_runs(name: str, times: int, bodies: dict, runs: dict[str, int], iterations: int) -> None:
    """Adds the runs of a computation and of the computations that it calls to `runs`."""
    runs[name] += times
    for _, opcode, rest in bodies.get(name, ()):
        called = _CALLED.findall(rest)
        if branches := _branches(rest):
            called.append(max(branches, key=lambda branch: _length(branch, bodies)))
        trips = _trips(rest, bodies, iterations) if opcode == "while" else 1
        for inner in called:
            _count_runs(inner, times * trips, bodies, runs, iterations)


def _branches(rest: str) -> list[str]:
    """Returns the names of a conditional's branches."""
    lists = _BRANCHES.findall(rest)
    return [name for names in lists for name in re.findall(r"%([\w.\-]+)", names)]


def _length(name: str, bodies: dict) -> int:
    """Returns the number of instructions of a computation and of those that it calls."""
    lines = bodies.get(name, ())
    called = [inner for _, _, rest in lines for inner in (*_CALLED.findall(rest), *_branches(rest))]
    return len(lines) + sum(_length(inner, bodies) for inner in called)


def _trips(rest: str, bodies: dict, iterations: int) -> int:
    """Returns a loop's iterations: the constant in its condition, or `iterations` if none."""
    condition = re.search(r"\bcondition=%([\w.\-]+)", rest)
    lines = bodies.get(condition[1], ()) if condition else ()
    matches = [_LIMIT.search(f"{opcode}({operands}") for _, opcode, operands in lines]
    limits = [int(match[1]) for match in matches if match]
    return max(limits, default=iterations)


def _bytes(shape: str, is_start: bool) -> float:
    """Returns the bytes of a result; for a start, only the largest part, as it has operands too."""
    sizes = []
    for kind, axes in _SHAPE.findall(shape):
        digits = re.search(r"\d+$", kind)
        width = _BYTES.get(kind, int(digits[0]) / 8 if digits else 4)
        sizes.append(width * math.prod(int(n) for n in axes.split(",") if n))
    return (max(sizes) if is_start else sum(sizes)) if sizes else 0.0


def _group(rest: str) -> int:
    """Returns the number of devices in a collective's group; XLA writes it in three formats."""
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", match[2]))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(match[1].split(","))
    return 2


def _sent(kind: str, size: float, group: int) -> float:
    """Returns the bytes that one device sends in a ring; `size` is the size of the result."""
    match kind:
        case "all-reduce":
            return 2 * size * (group - 1) / group
        case "reduce-scatter":
            return size * (group - 1)
        case "collective-permute":
            return size
        case _:
            return size * (group - 1) / group
