"""Reads the operations of a profile with the library xprof.

The library prints to stderr and writes files beside those that it reads. So `read` copies the files
and starts another process.
"""

import importlib.util
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

# Names of collectives in XLA, with the two halves of asynchronous ones.
_COLLECTIVE = re.compile(
    r"all[-_](reduce|gather|to[-_]all)|reduce[-_]scatter|collective[-_](permute|broadcast)"
)
# Operations that contain others, whose times count.
_CONTAINER = re.compile(r"(while|call|conditional)([.-]|$)")

MISSING = (
    "the operations of the profiles are not shown, since xprof is not installed; run pip install "
    "xprof"
)


class Operation(NamedTuple):
    """An operation of a compiled program, over all devices and steps of a profile.

    Attributes:
      name: its name in the program.
      category: its kind, for example "convolution fusion"; on CPUs the name without its number.
      runs: number of executions.
      seconds: time of all executions, without operations inside it.
    """

    name: str
    category: str
    runs: int
    seconds: float

    @property
    def is_collective(self) -> bool:
        """Whether it exchanges data between devices."""
        return bool(_COLLECTIVE.search(self.name) or _COLLECTIVE.search(self.category))


def is_available() -> bool:
    """Returns whether xprof is installed."""
    return importlib.util.find_spec("xprof") is not None


def read(files: Sequence[pathlib.Path]) -> list[Operation]:
    """Returns the operations of a profile, those with the longest time first.

    Args:
      files: the traces of all hosts.

    Returns:
      An empty list if the profile cannot be read or has no operations.
    """
    with tempfile.TemporaryDirectory(prefix="leon-") as folder:
        for path in files:
            shutil.copyfile(path, pathlib.Path(folder, path.name))
        program = "import sys; from leon_jax.report import operations as o; o.print_rows(sys.argv)"
        result = subprocess.run(
            [sys.executable, "-c", program, folder], capture_output=True, text=True, check=False
        )
    if result.returncode:
        return []
    operations = [Operation(*row) for row in json.loads(result.stdout.splitlines()[-1])]
    return sorted(operations, key=lambda operation: -operation.seconds)


def collective_share(operations: Sequence[Operation]) -> float:
    """Returns the share of collectives in the time of all operations, 0 to 1."""
    total = sum(operation.seconds for operation in operations)
    collectives = sum(each.seconds for each in operations if each.is_collective)
    return collectives / total if total else 0.0


def print_rows(arguments: Sequence[str]) -> None:
    """Prints the rows of the profile in the folder `arguments[1]` as one line of JSON."""
    from xprof.convert import raw_to_tool_data

    files = sorted(str(path) for path in pathlib.Path(arguments[1]).glob("*.xplane.pb"))
    data, _ = raw_to_tool_data.xspace_to_tool_data(files, "hlo_stats", {})
    print(json.dumps(_device_rows(json.loads(data)) or _cpu_rows(files)))


def _device_rows(table: dict) -> list[list]:
    """Returns the rows of xprof's table `hlo_stats`, which has operations of TPUs and GPUs."""
    columns = [column["id"] for column in table["cols"]]
    rows = []
    for row in table.get("rows") or []:
        cells = dict(zip(columns, (cell["v"] for cell in row["c"]), strict=True))
        rows.append(
            [
                cells["hlo_op_name"],
                cells["category"],
                int(cells["occurrences"]),
                cells["total_self_time"] / 1e6,
            ]
        )
    return rows


def _cpu_rows(files: Sequence[str]) -> list[list]:
    """Returns the rows of operations on CPUs, which are events of the host's threads."""
    from xprof import profile_data

    rows: dict[str, list] = {}
    for file in files:
        data = profile_data.ProfileData.from_file(file)
        for plane in data.planes:
            for line in plane.lines:
                for event in line.events:
                    name = event.name
                    if "hlo_op" not in dict(event.stats) or _CONTAINER.match(name):
                        continue
                    row = rows.setdefault(name, [name, re.sub(r"[.\d]+$", "", name), 0, 0.0])
                    row[2] += 1
                    row[3] += event.duration_ns / 1e9
    return list(rows.values())
