"""Writes docs/plans.md: what the CM3Leon models take on TPU pods, by `leon plan`.

    python benchmarks/plans.py

Compiles 27 programs, which takes some fifteen minutes on two cores.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = {"350M": "cm3leon_350m", "760M": "cm3leon_760m", "7B": "cm3leon_7b"}
# Remat policy and microbatches, by model and topology: what `leon plan --search` chose, the last
# one by hand.
SETTINGS = {
    ("350M", "v5e:16x16"): ("none", 4),
    ("350M", "v5p:8x8x4"): ("none", 1),
    ("350M", "v6e:16x16"): ("none", 2),
    ("350M", "tpu7x:8x8x4"): ("none", 1),
    ("760M", "v5e:16x16"): ("none", 4),
    ("760M", "v5p:8x8x4"): ("none", 1),
    ("760M", "v6e:16x16"): ("dots", 1),
    ("760M", "tpu7x:8x8x4"): ("none", 1),
    ("7B", "v5e:16x16"): ("full", 2),
    ("7B", "v5p:8x8x4"): ("none", 2),
    ("7B", "v6e:16x16"): ("attention", 1),
    ("7B", "tpu7x:8x8x4"): ("dots", 1),
}
MESHES = ("1,256,1,1", "4,64,1,1", "8,32,1,1", "1,64,4,1", "1,64,1,4")
# Weights and cache of the drawing programs, by topology and pictures at once.
DRAWING = [
    (topology, rows, weights, cache)
    for topology in ("v5e:2x4", "v5p:2x2x1")
    for rows, weights, cache in (
        (1, "bfloat16", "compute"),
        (1, "int8", "compute"),
        (16, "bfloat16", "compute"),
        (16, "int8", "compute"),
        (16, "int8", "int8"),
    )
]
GIB = 2**30
DOES_NOT_FIT = 3

HEAD = """\
# Plans

What the models of the paper take on TPU pods at the paper's batch of 8.4 million tokens (2,048 rows
of 4,096), compiled by the compiler for TPUs on a machine without one. Made by
`python benchmarks/plans.py`, which runs

```bash
leon plan --config=configs/cm3leon_7b.py --topology=v5p:8x8x4 --mesh=-1,64,1,1 \\
  --config.model.remat=none --config.microbatches=2
```

for every row, with a remat policy and microbatches that `--search` chose (the last row: chosen by
hand). The compiler comes with
`pip install 'leon_jax[tpu]'`; in this repository, `make tpu` puts it beside the environment, for
`TPU_LIBRARY_PATH=.tpu/libtpu/libtpu.so`.

{best}

{meshes}

{drawing}

A picture of 1,024 tokens after a prompt of 3,072 (two retrieved documents), with guidance, made by

```bash
leon plan --config=configs/cm3leon_7b.py --program=decode --topology=v5e:2x4 --rows=1 --weights=int8
```

and so on, tensor parallel over all chips. *Cache* is of both streams: the unconditional one has a
short prompt, and keys and values in 8 bits (the rows that say so) take a little over half. *Others*
is what lives beside it at the peak while writing. *Seconds* are those of the roofline: weights and
cache read once a token, and the collectives of the compiled loop; no run is faster.

## What the figures of training say

Split over all 256 chips (first line) each has 16 columns of an embedding, and the compiler gathers
and reduces by all-reduce, at twice the bytes; with 64 it does not. `--search` tries other shares of
`data` and `fsdp`. Context parallelism (fourth line) gathers keys and values, which at this batch is
four times what the weights take: 2.1 GB a layer on each device. Ring attention would send the same
bytes in pieces and keep fewer of them at once. Rows of 4,096 tokens need neither, so it is not
built.

## What the figures are

*Peak* is the most that lives at once in the memory of one device, in the compiler's schedule:
parameters, optimizer state (both float32), and everything else. A TPU7x chip shows as two devices.
Whether a program fits is decided by the compiler, which also needs room for packing: its limit is a
little below the chip's capacity, and it works harder, or refuses, long before a sum says so.

*Sent* is what one device sends in one step. It is read from the compiled program: the bytes of
every collective, by the ring algorithms, times how often the loops around it run.

*Bound* is the time that a step cannot be faster than: the longest of

- compute: the operations that are executed, computed again ones included, at the chip's peak;
- memory: operands and results of matrix products, gathered weights and the optimizer's state, at
  the bandwidth of device memory;
- links: what is sent, at the bandwidth of all links of the chip together.

Operations and traffic are counted from the model's shape (`leon_jax/plan/roofline.py`), because XLA
counts the body of a loop once. Nothing else is counted, so a run is slower: this is a bound, no
prediction.

*MFU at most* is what [MFU](train.md#goodput-and-utilisation) would be at that time. Beside it
stands what it would be if no collective were hidden behind arithmetic. `--search` takes the setting
with the least arithmetic and collectives, added up.

*Days* are those of the paper's token budget (1.4, 1.9 and 2.4 trillion tokens) at the bound.
"""


def plan(*flags: str) -> dict:
    """What `leon plan` writes; nothing if it does not fit."""
    print(*flags, file=sys.stderr, flush=True)
    environment = {"TPU_LIBRARY_PATH": str(ROOT / ".tpu/libtpu/libtpu.so"), **os.environ}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "leon_jax.cli.main", "plan", *flags, f"--out={folder}"]
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        if done.returncode == DOES_NOT_FIT:
            return {}
        done.check_returncode()
        return json.loads(pathlib.Path(folder, "plan.json").read_text())


def row(first: list[str], found: dict, last: bool = True) -> str:
    """One line of a table."""
    if not found:
        return f"| {' | '.join([*first, 'does not fit'])} |"
    setting, memory = found["setting"], found["memory"]
    figures, bound = found["figures"], found["rooflines"]["step"]
    sent = {kind: each["bytes_sent"] / 1e9 for kind, each in found["collectives"].items()}
    cells = [
        *first,
        f"{setting['remat']}, {setting['microbatches']}",
        f"{memory['peak'] / GIB:.1f} of {memory['capacity'] / GIB:.0f}",
        f"{(memory['parameters'] + memory['optimizer']) / GIB:.2f}",
        " + ".join(f"{size:.1f} {kind}" for kind, size in sent.items() if size >= 0.05),
        f"{bound['compute']:.3g} / {bound['memory']:.3g} / {bound['links']:.3g}",
        f"**{100 * figures['mfu_bound']:.0f} %** ({100 * figures['mfu_serial']:.0f} %)",
    ]
    if last:
        cells += [f"{figures['tokens_per_second'] / 1e6:.2f}", f"{figures['days']:.1f}"]
    return f"| {' | '.join(cells)} |"


def drawing_row(first: list[str], found: dict) -> str:
    """One line of the table of drawing programs."""
    if not found:
        return f"| {' | '.join([*first, 'does not fit'])} |"
    memory, figures = found["memory"], found["figures"]
    bound = found["rooflines"]["token"]
    sizes = [memory[name] / GIB for name in ("parameters", "cache", "activations", "peak")]
    cells = [
        *first,
        *(f"{size:.2f}" for size in sizes),
        f"{memory['capacity'] / GIB:.0f}",
        f"{1e3 * bound['compute']:.2f} / {1e3 * bound['memory']:.2f} / {1e3 * bound['links']:.2f}",
        f"{figures['seconds_per_batch'] / found['setting']['rows']:.2f}",
        f"{figures['tokens_per_second']:,.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def table(head: list[str], rows: list[str]) -> str:
    """A table in Markdown."""
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *rows])


def main() -> None:
    best, meshes = [], []
    for (model, topology), (remat, microbatches) in SETTINGS.items():
        found = plan(
            f"--config=configs/{CONFIGS[model]}.py",
            f"--topology={topology}",
            "--mesh=-1,64,1,1",
            f"--config.model.remat={remat}",
            f"--config.microbatches={microbatches}",
        )
        best.append(row([model, topology], found))
    for mesh in MESHES:
        found = plan("--config=configs/cm3leon_7b.py", "--topology=v5p:8x8x4", f"--mesh={mesh}")
        meshes.append(row([mesh.replace(",", " x ")], found, last=False))
    drawing = []
    for topology, rows, weights, cache in DRAWING:
        found = plan(
            "--config=configs/cm3leon_7b.py", "--program=decode", f"--topology={topology}",
            f"--rows={rows}", f"--weights={weights}", f"--cache={cache}",
        )  # fmt: skip
        kept = weights if cache == "compute" else f"{weights}, cache too"
        drawing.append(drawing_row([topology, str(rows), kept], found))
    columns = [
        "remat, microbatches",
        "peak, GiB",
        "state, GiB",
        "sent, GB",
        "compute / memory / links, s",
        "MFU at most (nothing hidden)",
    ]
    best_table = table(["model", "topology", *columns, "million tokens/s", "days"], best)
    meshes_table = table(["data x fsdp x context x tensor", *columns], meshes)
    drawing_table = table(
        ["topology", "pictures at once", "weights", "weights, GiB", "cache, GiB", "others, GiB",
         "peak, GiB", "of GiB", "a token: compute / memory / links, ms",
         "seconds a picture at least", "tokens/s at most"],
        drawing,
    )  # fmt: skip
    text = HEAD.format(
        drawing=f"## Drawing with 7B\n\n{drawing_table}",
        best=f"## Models and pods\n\n{best_table}",
        meshes=f"## 7B on v5p:8x8x4 with other meshes\n\n{meshes_table}",
    )
    page = ROOT / "docs" / "plans.md"
    temporary = page.with_name(page.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(page)


if __name__ == "__main__":
    main()
