"""Writes docs/mining.md: the index searched at scale, beside FAISS, and planned for a pod.

    python -m benchmarks.mining

makes a bank of a million rows, searches it for the 20 nearest of 20,000 queries with our exact and
our approximate search and with FAISS's flat index, each a process of its own that takes turns with
the others; compares what they find with float64; and looks at the memory that banks of one, two and
four million rows take. Needs 10 GB of disk, and `make tpu` for the plans; `--plan` prints these
alone. On two cores it takes half an hour.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile

import numpy as np

from benchmarks.quiet import Watch, wait
from benchmarks.turns import ROOT, Worker
from leon_jax.retrieval.faiss_export import export
from leon_jax.retrieval.vector_index import VectorIndex, save_rows

SIDES = {"exact": "ours, exact", "approximate": "ours, approximate", "faiss": "FAISS `IndexFlatIP`"}
TOPICS, CLUSTERS = 1000, 20_000
MIB, GIB = 2**20, 2**30


def draw(rng: np.random.Generator, count: int, dimensions: int, seed: int) -> np.ndarray:
    """Clustered unit rows, float16[count, dimensions].

    A thousand topics are random directions; a cluster is a topic and 0.7 of a random direction; a
    row is a cluster and 0.8 of another. Cluster c is drawn with a weight of 1 / sqrt(c). Two rows
    of a cluster have a cosine of about 0.6, two of a topic 0.4, and others 0.
    """

    def directions(generator: np.random.Generator, number: int) -> np.ndarray:
        rows = generator.standard_normal((number, dimensions), np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    fixed = np.random.default_rng(seed)
    topics = directions(fixed, TOPICS)[fixed.integers(0, TOPICS, CLUSTERS)]
    centres = topics + 0.7 * directions(fixed, CLUSTERS)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    weights = 1 / np.sqrt(np.arange(1, CLUSTERS + 1))
    chosen = rng.choice(CLUSTERS, count, p=weights / weights.sum())
    rows = centres[chosen] + 0.8 * directions(rng, count)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def make(folder: pathlib.Path, arguments: argparse.Namespace) -> list[str]:
    """Writes the queries, the shards of the largest bank (a quarter of the smallest each), and
    FAISS's index of the smallest; returns the shards.
    """
    queries = draw(np.random.default_rng([arguments.seed, 0]), arguments.queries,
                   arguments.dimensions, arguments.seed)  # fmt: skip
    save_rows(folder / "queries.npy", queries.astype(np.float32))
    shards = [str(folder / f"bank-{number:03}.npy") for number in range(4 * max(arguments.growth))]
    for number, path in enumerate(shards):
        rng = np.random.default_rng([arguments.seed, 1 + number])
        rows = draw(rng, arguments.rows // 4, arguments.dimensions, arguments.seed)
        save_rows(path, rows)
    export(VectorIndex.open(shards[:4]), folder / "bank.faiss")
    return shards


def worker(side: str, folder: pathlib.Path, files: list[str], k: int) -> Worker:
    command = [sys.executable, "-m", "benchmarks.mining_worker", side, str(folder / "queries.npy")]
    return Worker([*command, *files, f"--k={k}"], {"JAX_PLATFORMS": "cpu"})


def measure(folder: pathlib.Path, shards: list[str], arguments: argparse.Namespace) -> dict:
    """Seconds of every round, peaks of memory and recall, by side; and what others used."""
    files = {"exact": shards[:4], "approximate": shards[:4], "faiss": [str(folder / "bank.faiss")]}
    workers: dict[str, Worker] = {}
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    most = 0.0
    try:
        for side in SIDES:
            workers[side] = worker(side, folder, files[side], arguments.k)
            workers[side].ask("search", min(1024, arguments.queries), "")  # compiles, warms up
        for number in range(3 * arguments.rounds):
            if not wait(arguments.noise, arguments.patience):
                sys.exit("other programs use this machine; end them, or see --noise")
            watch = Watch(each.pid for each in workers.values())
            turn = {
                side: each.ask("search", arguments.queries, str(folder / f"{side}.npy"))
                for side, each in workers.items()
            }
            others = watch.others()
            say(f"round {number + 1}: {turn}, others used {100 * others:.1f} % of the CPU")
            if others <= arguments.noise:
                most = max(most, others)
                for side, took in turn.items():
                    seconds[side].append(took)
            if len(seconds["faiss"]) == arguments.rounds:
                break
        else:
            sys.exit("other programs used this machine in too many rounds; see --noise")
        peaks = {side: each.ask("peak") for side, each in workers.items()}
    finally:
        for each in workers.values():
            each.end()
    best = nearest_in_float64(folder, shards[:4], arguments)
    recalls: dict[str, float] = {}
    for side in SIDES:
        found = np.load(folder / f"{side}.npy")[: len(best)]
        same = [len(set(a) & set(b)) for a, b in zip(found, best, strict=True)]
        recalls[side] = sum(same) / best.size
    return {"seconds": seconds, "peaks": peaks, "recalls": recalls, "others": most}


def nearest_in_float64(
    folder: pathlib.Path, shards: list[str], arguments: argparse.Namespace
) -> np.ndarray:
    """Ids of the k best for the first queries, int[truth, k]."""
    bank = VectorIndex.open(shards)
    queries = np.load(folder / "queries.npy")[: arguments.truth].astype(np.float64)
    scores, ids = np.zeros((len(queries), 0)), np.zeros((len(queries), 0), np.int64)
    for start in range(0, len(bank), 32_768):
        rows = bank.rows(start, min(start + 32_768, len(bank))).astype(np.float64)
        here = np.broadcast_to(start + np.arange(len(rows)), (len(queries), len(rows)))
        scores = np.concatenate([scores, queries @ rows.T], axis=1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, : arguments.k]
        scores = np.take_along_axis(scores, best, axis=1)
        ids = np.take_along_axis(np.concatenate([ids, here], axis=1), best, axis=1)
    return ids


def growth(folder: pathlib.Path, shards: list[str], arguments: argparse.Namespace) -> list[dict]:
    """Peaks of memory of a process that searches a bank once, by the size of the bank."""
    found = []
    for times in arguments.growth:
        alone = worker("exact", folder, shards[: 4 * times], arguments.k)
        try:
            alone.ask("search", arguments.growth_queries, "")
            found.append({"rows": times * arguments.rows, **alone.ask("peak")})
        finally:
            alone.end()
        say(f"memory: {found[-1]}")
    return found


def plans(arguments: argparse.Namespace) -> list[dict]:
    """The program of the pod, exact and approximate."""
    environment = {"TPU_LIBRARY_PATH": str(ROOT / ".tpu/libtpu/libtpu.so"), **os.environ}
    command = [
        sys.executable, "-m", "benchmarks.mining_plan", f"--topology={arguments.topology}",
        f"--documents={arguments.documents}", f"--k={arguments.candidates}",
    ]  # fmt: skip
    return [
        json.loads(
            subprocess.run(
                [*command, f"--recall={recall}"],
                cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True,
            ).stdout
        )
        for recall in (1.0, 0.99)
    ]  # fmt: skip


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def plan_table(found: list[dict]) -> str:
    """A line for the exact and one for the approximate search."""
    rows = []
    for plan in found:
        sent = {kind: each["bytes_sent"] / 1e6 for kind, each in plan["collectives"].items()}
        rows.append(
            [
                "exact" if plan["recall"] == 1 else f"approximate, {plan['recall']}",
                f"{plan['queries']:,}",
                f"{plan['held'] / GIB:.2f} of {plan['capacity'] / GIB:.0f}",
                f"{plan['working'] / MIB:.1f}",
                " + ".join(f"{size:.2f} {kind}" for kind, size in sent.items() if size),
                " / ".join(f"{1000 * s:.3g}" for s in plan["batch"].values()),
                " / ".join(f"{s:,.0f}" for s in plan["all"].values()),
                f"**{max(plan['all'].values()) / 3600:.1f}**",
            ]
        )
    columns = [
        "search", "queries of a batch", "held, GiB", "working, MiB", "sent a batch, MB",
        "a batch: compute / memory / links, ms", "all: compute / memory / links, s", "hours",
    ]  # fmt: skip
    return table(columns, rows)


def page(arguments, measured: dict, grown: list[dict], planned: list[dict]) -> str:
    """The whole page."""
    scores = arguments.rows * arguments.queries
    theirs = measured["seconds"]["faiss"]
    rows = []
    for side, name in SIDES.items():
        took, peak = measured["seconds"][side], measured["peaks"][side]
        ratios = sorted(b / a for a, b in zip(took, theirs, strict=True))
        rows.append(
            [
                name,
                f"{statistics.median(took):.1f}",
                f"**{statistics.median(ratios):.2f}** ({ratios[0]:.2f} to {ratios[-1]:.2f})",
                f"{2e-9 * scores * arguments.dimensions / statistics.median(took):.0f}",
                f"{measured['recalls'][side]:.4f}",
                f"{peak['anonymous'] / MIB:,.0f}",
                f"{peak['resident'] / MIB:,.0f}",
            ]
        )
    speed = table(
        ["search", "seconds", "times as fast as FAISS", "GFLOP/s", f"recall@{arguments.k}",
         "peak, MiB", "all that was mapped, MiB"],
        rows,
    )  # fmt: skip
    memory = table(
        ["rows", "files, MiB", "peak, MiB", "all that was mapped, MiB"],
        [
            [
                f"{each['rows']:,}",
                f"{each['rows'] * arguments.dimensions * 2 / MIB:,.0f}",
                f"{each['anonymous'] / MIB:,.0f}",
                f"{each['resident'] / MIB:,.0f}",
            ]
            for each in grown
        ],
    )  # fmt: skip
    text = HEAD.format(
        rows=arguments.rows, dimensions=arguments.dimensions, queries=arguments.queries,
        k=arguments.k, truth=arguments.truth, seed=arguments.seed, rounds=len(theirs),
        others=100 * measured["others"], machine=machine(), speed=speed, memory=memory,
        growth_queries=arguments.growth_queries,
    )  # fmt: skip
    if planned:
        text += PLAN.format(
            topology=arguments.topology, documents=arguments.documents / 1e6,
            candidates=arguments.candidates, plan=plan_table(planned), rows=planned[0]["rows"],
            devices=planned[0]["devices"], tile=planned[0]["tile"],
            reads=arguments.documents * arguments.candidates * 1024 / 1e12,
        )  # fmt: skip
    return text


HEAD = """\
# Mining

How the index ([retrieval](retrieval.md)) is searched at scale. Made by
`python -m benchmarks.mining`.

## Beside FAISS

The {k} nearest of {queries:,} queries in a bank of {rows:,} rows of {dimensions}, on {machine}.
Our bank is float16 in four files, mapped into memory and read during the search from the system's
cache; FAISS's flat index is the same rows in float32, read into memory before and searched with as
many threads as there are cores. Three processes take turns; medians of {rounds} rounds, in which
other programs used at most {others:.1f} % of the CPU.

{speed}

*Recall* is the part of the {k} best that is found, for {truth} queries; the best are those by
products of the same float16 rows in float64. *Peak* is the most memory that the process allocated
(RssAnon, sampled every 5 ms), from its start on and compiling included. *All that was mapped* is
the most of this and of pages of mapped files together (VmHWM): programs and libraries, and the
bank's pages, which are the system's cache and given up when something else needs the memory.

The approximate search multiplies in bfloat16. On CPUs it leaves out nothing else, so its recall
here says nothing of `approx_max_k`, which is what it uses on TPUs.

The rows are clustered unit vectors (seed {seed}): a thousand topics are random directions, a
cluster (20,000) is a topic and 0.7 of a random direction, a row is a cluster and 0.8 of another,
all brought to length 1. Cluster *c* is drawn with a weight of 1 / sqrt(*c*). Queries are drawn like
rows.

## Memory and the size of the bank

The exact search of {growth_queries:,} queries, by a fresh process for each bank. What it holds does
not grow with the bank: it goes up and down with every block (128 MiB), and of more blocks the
highest is a little higher.

{memory}
"""

PLAN = """
## On a pod

A bank of {documents:,.0f} million documents on {topology}, searched for the {candidates}
candidates of every one of them: the program of a batch of queries, compiled by the compiler for
TPUs on a machine without one (`python -m benchmarks.mining --plan`).

{plan}

Each of the {devices} devices has {rows:,} rows of float16 and scores {tile:,} at a time. *Held* is
what stays from batch to batch: the bank, its mask, queries and lists. *Working* is what the program
takes of device memory beside it. It is less than a tile of scores, which never leave the chip: the
approximate search reduces them where they are made, and those of an exact one stay in vector
memory. *Sent* is what one device sends, read from the compiled program. *Compute* counts the
products at the chip's peak, six passes for float32; *memory* reads all that is held once a batch;
*links* is what is sent at the bandwidth of all links. *Hours* is the longest of the three for all
batches: a bound that no run can beat, and no prediction. Not counted: taking the best of a tile;
time between batches; and the choice among candidates, for which the hosts read {reads:,.0f} TB of
rows in all, at places that are in no order.
"""


def machine() -> str:
    """What this is measured on."""
    model = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return f"{os.cpu_count()} cores of {model}"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="a multiple of 4")
    parser.add_argument("--dimensions", type=int, default=512)
    parser.add_argument("--queries", type=int, default=20_000)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--truth", type=int, default=400, help="queries that recall is taken of")
    parser.add_argument("--growth", type=int, nargs="*", default=[1, 2, 4], help="times --rows")
    parser.add_argument("--growth_queries", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--noise", type=float, default=0.03, help="share of the CPU that others may use"
    )
    parser.add_argument(
        "--patience", type=float, default=600, help="seconds to wait for that, before a round"
    )
    parser.add_argument("--plan", action="store_true", help="only print the plans")
    parser.add_argument("--topology", default="v5e:16x16", help="empty: leave the plans out")
    parser.add_argument("--documents", type=int, default=340_000_000, help="of the plans")
    parser.add_argument("--candidates", type=int, default=128, help="of the plans")
    parser.add_argument("--folder", help="where the bank is made; a temporary one by default")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "docs" / "mining.md")
    arguments = parser.parse_args()
    planned = plans(arguments) if arguments.topology else []
    if arguments.plan:
        print(plan_table(planned))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = pathlib.Path(name)
        shards = make(folder, arguments)
        measured = measure(folder, shards, arguments)
        say(json.dumps(measured))
        grown = growth(folder, shards, arguments)
    text = page(arguments, measured, grown, planned)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = arguments.out.with_name(arguments.out.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(arguments.out)


if __name__ == "__main__":
    main()
