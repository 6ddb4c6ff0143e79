"""Benchmarks search of the index against FAISS, plans it for a pod, and writes docs/mining.md.

    python -m benchmarks.mining

Writes an index of a million rows and searches the 20 nearest rows of 20,000 queries with our exact
search, our approximate search and FAISS's flat index. The three are processes that take turns.
Their results are compared with float64. Then the benchmark measures the memory of searches in
indices of one, two and four million rows.

Needs 10 GB of disk, and `make tpu` for the plans. `--plan` prints only the plans. On two cores the
benchmark takes half an hour.
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


def sample_rows(rng: np.random.Generator, count: int, dimensions: int, seed: int) -> np.ndarray:
    """Samples clustered unit rows, float16[count, dimensions].

    A thousand topics are random directions. A cluster is a topic plus 0.7 times a random direction.
    A row is a cluster plus 0.8 times a random direction. Cluster c has a weight of 1 / sqrt(c). Two
    rows of a cluster have a cosine of about 0.6, two of a topic 0.4, and others 0.
    """

    def directions(generator: np.random.Generator, number: int) -> np.ndarray:
        rows = generator.standard_normal((number, dimensions), np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    cluster_rng = np.random.default_rng(seed)
    topics = directions(cluster_rng, TOPICS)[cluster_rng.integers(0, TOPICS, CLUSTERS)]
    centres = topics + 0.7 * directions(cluster_rng, CLUSTERS)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    weights = 1 / np.sqrt(np.arange(1, CLUSTERS + 1))
    clusters = rng.choice(CLUSTERS, count, p=weights / weights.sum())
    rows = centres[clusters] + 0.8 * directions(rng, count)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def write_data(folder: pathlib.Path, arguments: argparse.Namespace) -> list[str]:
    """Writes the queries, the shards of the largest index, and FAISS's index of the smallest.

    Returns:
      The paths of the shards; each shard is a quarter of the smallest index.
    """
    queries = sample_rows(np.random.default_rng([arguments.seed, 0]), arguments.queries,
                   arguments.dimensions, arguments.seed)  # fmt: skip
    save_rows(folder / "queries.npy", queries.astype(np.float32))
    shards = [str(folder / f"bank-{number:03}.npy") for number in range(4 * max(arguments.growth))]
    for number, path in enumerate(shards):
        rng = np.random.default_rng([arguments.seed, 1 + number])
        rows = sample_rows(rng, arguments.rows // 4, arguments.dimensions, arguments.seed)
        save_rows(path, rows)
    export(VectorIndex.open(shards[:4]), folder / "bank.faiss")
    return shards


def worker(side: str, folder: pathlib.Path, files: list[str], k: int) -> Worker:
    command = [sys.executable, "-m", "benchmarks.mining_worker", side, str(folder / "queries.npy")]
    return Worker([*command, *files, f"--k={k}"], {"JAX_PLATFORMS": "cpu"})


def measure(folder: pathlib.Path, shards: list[str], arguments: argparse.Namespace) -> dict:
    """Returns the seconds of each round, peak memory and recall by side, and the use by others."""
    files = {"exact": shards[:4], "approximate": shards[:4], "faiss": [str(folder / "bank.faiss")]}
    workers: dict[str, Worker] = {}
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    max_others = 0.0
    try:
        for side in SIDES:
            workers[side] = worker(side, folder, files[side], arguments.k)
            workers[side].ask("search", min(1024, arguments.queries), "")  # compiles and warms up
        for number in range(3 * arguments.rounds):
            if not wait(arguments.noise, arguments.patience):
                sys.exit("other programs use this machine; end them, or see --noise")
            watch = Watch(process.pid for process in workers.values())
            times = {
                side: process.ask("search", arguments.queries, str(folder / f"{side}.npy"))
                for side, process in workers.items()
            }
            others = watch.others()
            log(f"round {number + 1}: {times}, others used {100 * others:.1f} % of the CPU")
            if others <= arguments.noise:
                max_others = max(max_others, others)
                for side, elapsed in times.items():
                    seconds[side].append(elapsed)
            if len(seconds["faiss"]) == arguments.rounds:
                break
        else:
            sys.exit("other programs used this machine in too many rounds; see --noise")
        peaks = {side: process.ask("peak") for side, process in workers.items()}
    finally:
        for process in workers.values():
            process.end()
    best = nearest_in_float64(folder, shards[:4], arguments)
    recalls: dict[str, float] = {}
    for side in SIDES:
        ids = np.load(folder / f"{side}.npy")[: len(best)]
        matches = [len(set(a) & set(b)) for a, b in zip(ids, best, strict=True)]
        recalls[side] = sum(matches) / best.size
    return {"seconds": seconds, "peaks": peaks, "recalls": recalls, "others": max_others}


def nearest_in_float64(
    folder: pathlib.Path, shards: list[str], arguments: argparse.Namespace
) -> np.ndarray:
    """Returns the ids of the k nearest rows of the first queries, int[truth, k]."""
    bank = VectorIndex.open(shards)
    queries = np.load(folder / "queries.npy")[: arguments.truth].astype(np.float64)
    scores, ids = np.zeros((len(queries), 0)), np.zeros((len(queries), 0), np.int64)
    for start in range(0, len(bank), 32_768):
        rows = bank.rows(start, min(start + 32_768, len(bank))).astype(np.float64)
        block_ids = np.broadcast_to(start + np.arange(len(rows)), (len(queries), len(rows)))
        scores = np.concatenate([scores, queries @ rows.T], axis=1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, : arguments.k]
        scores = np.take_along_axis(scores, best, axis=1)
        ids = np.take_along_axis(np.concatenate([ids, block_ids], axis=1), best, axis=1)
    return ids


def growth(folder: pathlib.Path, shards: list[str], arguments: argparse.Namespace) -> list[dict]:
    """Returns the peak memory of a process that searches an index once, by the index's size."""
    peaks = []
    for factor in arguments.growth:
        process = worker("exact", folder, shards[: 4 * factor], arguments.k)
        try:
            process.ask("search", arguments.growth_queries, "")
            peaks.append({"rows": factor * arguments.rows, **process.ask("peak")})
        finally:
            process.end()
        log(f"memory: {peaks[-1]}")
    return peaks


def plans(arguments: argparse.Namespace) -> list[dict]:
    """Plans the exact and the approximate search on the pod."""
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
    """Returns a Markdown table."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def plan_table(pod_plans: list[dict]) -> str:
    """Returns a table with a row for the exact and one for the approximate search."""
    rows = []
    for plan in pod_plans:
        sent = {kind: counts["bytes_sent"] / 1e6 for kind, counts in plan["collectives"].items()}
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


def page(arguments, measured: dict, growth_peaks: list[dict], pod_plans: list[dict]) -> str:
    """Returns the whole page."""
    scores = arguments.rows * arguments.queries
    theirs = measured["seconds"]["faiss"]
    rows = []
    for side, name in SIDES.items():
        seconds, peak = measured["seconds"][side], measured["peaks"][side]
        ratios = sorted(b / a for a, b in zip(seconds, theirs, strict=True))
        rows.append(
            [
                name,
                f"{statistics.median(seconds):.1f}",
                f"**{statistics.median(ratios):.2f}** ({ratios[0]:.2f} to {ratios[-1]:.2f})",
                f"{2e-9 * scores * arguments.dimensions / statistics.median(seconds):.0f}",
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
                f"{peak['rows']:,}",
                f"{peak['rows'] * arguments.dimensions * 2 / MIB:,.0f}",
                f"{peak['anonymous'] / MIB:,.0f}",
                f"{peak['resident'] / MIB:,.0f}",
            ]
            for peak in growth_peaks
        ],
    )  # fmt: skip
    text = HEAD.format(
        rows=arguments.rows, dimensions=arguments.dimensions, queries=arguments.queries,
        k=arguments.k, truth=arguments.truth, seed=arguments.seed, rounds=len(theirs),
        others=100 * measured["others"], machine=machine(), speed=speed, memory=memory,
        growth_queries=arguments.growth_queries, documents=arguments.documents / 1e6,
    )  # fmt: skip
    if pod_plans:
        text += PLAN.format(
            topology=arguments.topology, documents=arguments.documents / 1e6,
            candidates=arguments.candidates, plan=plan_table(pod_plans),
            rows=pod_plans[0]["rows"], devices=pod_plans[0]["devices"], tile=pod_plans[0]["tile"],
            reads=arguments.documents * arguments.candidates * 1024 / 1e12,
        )  # fmt: skip
    return text


HEAD = """\
# Mining

```bash
python -m benchmarks.mining
python -m benchmarks.mining --plan
```

The first command measures how fast the index ([retrieval](retrieval.md#the-index)) is searched,
compared with FAISS. The second plans a search of {documents:,.0f} million documents on a TPU pod.

## Compared with FAISS

The search finds the {k} nearest rows for each of {queries:,} queries, in an index of {rows:,} rows
of {dimensions}, on {machine}. Our index is float16 in four files. They are mapped into memory and
read from the system's cache during the search. The flat index of FAISS has the same rows in
float32. It is read into memory before the search, and searched with as many threads as there are
cores. Three processes take turns. The numbers are medians of {rounds} rounds. Other programs used
at most {others:.1f} % of the CPU.

{speed}

*Recall* is the share of the true {k} best rows that a search finds, for {truth} queries. The true
best rows come from products of the same float16 rows in float64. *Peak* is the most memory that the
process allocated (RssAnon, sampled every 5 ms) since its start, with compiling. *All that was
mapped* is the most of this memory and the pages of mapped files together (VmHWM): programs,
libraries, and the pages of the index. The pages of the index belong to the system's cache, which
releases them when another program needs memory.

The approximate search multiplies in bfloat16. On CPUs it skips nothing else. So its recall here
says nothing about `approx_max_k`, which it uses on TPUs.

The rows are clustered unit vectors (seed {seed}). A thousand topics are random directions. A
cluster (20,000 of them) is a topic plus 0.7 times a random direction. A row is a cluster plus 0.8
times a random direction. All have length 1. Cluster *c* is sampled with a weight of 1 / sqrt(*c*).
Queries are sampled like rows.

## Memory and the size of the index

A new process searches each index exactly, for {growth_queries:,} queries. Its memory does not grow
with the index. It goes up and down with every block (128 MiB). With more blocks, the highest peak
is a little higher.

{memory}
"""

PLAN = """
## On a pod

The plan is for an index of {documents:,.0f} million documents on {topology}. For every document it
finds {candidates} candidates. The TPU compiler compiles the program of one batch of queries, on a
machine without a TPU.

{plan}

Each of the {devices} devices has {rows:,} rows of float16, and scores {tile:,} at a time.

- *Held* is what stays from batch to batch: the index, its mask, the queries and the lists.
- *Working* is the other device memory of the program. It is less than a tile of scores, because
  scores never leave the chip. The approximate search reduces them where they are made; the exact
  search keeps them in vector memory.
- *Sent* is what one device sends, read from the compiled program.
- *Compute* counts the products at the chip's peak, six passes for float32. *Memory* reads
  everything that is held once a batch. *Links* is what is sent, at the bandwidth of all links.
- *Hours* is the longest of the three for all batches. It is a bound that no run can beat, not a
  prediction.

Not counted: selecting the best of a tile; the time between batches; and the selection among
candidates. For that selection the hosts read {reads:,.0f} TB of rows in all, in random order.
"""


def machine() -> str:
    """Returns the number of cores and the processor."""
    model = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return f"{os.cpu_count()} cores of {model}"


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="a multiple of 4")
    parser.add_argument("--dimensions", type=int, default=512)
    parser.add_argument("--queries", type=int, default=20_000)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--truth", type=int, default=400, help="queries for recall")
    parser.add_argument(
        "--growth",
        type=int,
        nargs="*",
        default=[1, 2, 4],
        help="sizes of the index in the memory test, as multiples of --rows",
    )
    parser.add_argument("--growth_queries", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--noise", type=float, default=0.03, help="share of the CPU that other programs may use"
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=600,
        help="seconds to wait for a quiet machine before a round",
    )
    parser.add_argument("--plan", action="store_true", help="print only the plans")
    parser.add_argument(
        "--topology", default="v5e:16x16", help="topology of the plans; empty for no plans"
    )
    parser.add_argument("--documents", type=int, default=340_000_000, help="documents in the plans")
    parser.add_argument("--candidates", type=int, default=128, help="candidates in the plans")
    parser.add_argument("--folder", help="parent of the temporary folder of the index")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "docs" / "mining.md")
    arguments = parser.parse_args()
    pod_plans = plans(arguments) if arguments.topology else []
    if arguments.plan:
        print(plan_table(pod_plans))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = pathlib.Path(name)
        shards = write_data(folder, arguments)
        measured = measure(folder, shards, arguments)
        log(json.dumps(measured))
        growth_peaks = growth(folder, shards, arguments)
    text = page(arguments, measured, growth_peaks, pod_plans)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = arguments.out.with_name(arguments.out.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(arguments.out)


if __name__ == "__main__":
    main()
