"""Plans the CM3Leon models on TPU pods with `leon plan`, and writes docs/plans.md.

    python benchmarks/plans.py --results=out/plans

A program compiles in one to fifteen minutes on one core. `--results` keeps the result of each one,
so the same command continues after a stop. After a change of leon_jax use another folder.
"""

import argparse
import collections
import hashlib
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = {"350M": "cm3leon_350m", "760M": "cm3leon_760m", "7B": "cm3leon_7b"}
# Remat policy and microbatches by model and topology.
SETTINGS = {
    ("7B", "v5p:8x8x4"): ("dots_and_attention", 1),
    ("7B", "v6e:16x16"): ("dots_and_attention", 4),
    ("7B", "v5e:16x16"): ("full", 2),
    ("7B", "tpu7x:8x8x4"): ("dots_and_attention", 1),
    ("760M", "v5p:8x8x4"): ("none", 1),
    ("760M", "v6e:16x16"): ("dots", 1),
    ("760M", "v5e:16x16"): ("none", 4),
    ("760M", "tpu7x:8x8x4"): ("none", 1),
    ("350M", "v5p:8x8x4"): ("none", 1),
    ("350M", "v6e:16x16"): ("none", 2),
    ("350M", "v5e:16x16"): ("none", 4),
    ("350M", "tpu7x:8x8x4"): ("none", 1),
}
# Topologies of 7B that are planned with the preset of their chip too.
WITH_PRESET = ("v5p:8x8x4", "tpu7x:8x8x4", "v5e:16x16", "v6e:16x16")
# The plan compiles the evaluation too.
EVALUATED = "--config.loop.eval_every=1000"
# Config, flags and topologies of the other models.
VOCABULARY = "--config.model.text.vocab_size=49408"
OTHERS = [
    ("image tokenizer", ("--config=configs/vqgan_256.py",)),
    ("retrieval encoder", ("--config=configs/clip_b32.py", VOCABULARY)),
]
SMALL_PODS = ("v5e:4x4", "v5p:4x4x4")
MESHES = ("1,256,1,1", "4,64,1,1", "8,32,1,1", "1,64,4,1", "1,64,1,4")
# Topology, images in a batch, and dtypes of weights and cache of the decode programs.
DECODING = [
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

PAGE = """\
# Plans for TPU pods

```bash
leon plan --config=configs/cm3leon_7b.py --topology=v5p:8x8x4 --mesh=-1,64,1,1 \\
  --config.model.remat=dots_and_attention --config.microbatches=1 --config.loop.compiler=v5p \\
  --config.loop.eval_every=1000
leon plan --config=configs/cm3leon_7b.py --topology=v5p:8x8x4 --search
leon plan --config=configs/cm3leon_7b.py --program=decode --topology=v5e:2x4 --rows=1 --weights=int8
leon plan --config=configs/vqgan_256.py --topology=v5e:4x4 --search
leon plan --config=configs/clip_b32.py --config.model.text.vocab_size=49408 --topology=v5p:4x4x4
```

`leon plan` compiles a config for a TPU pod, on a machine without a TPU, and prints memory, traffic
and time. With `--search` it looks for the fastest settings that fit, or for the smallest change
that makes the config fit. Exit code 3 means that the config does not fit. It needs the TPU
compiler: `pip install 'leon_jax[tpu]'`, or in this repository `make tpu` and
`TPU_LIBRARY_PATH=.tpu/libtpu/libtpu.so`.

This page plans the paper's models at the paper's batch of 8.4 million tokens (2,048 rows of
4,096). Every row is one `leon plan` command. `python benchmarks/plans.py` runs them all.
`--search` chose the remat policies and microbatches of 350M, of 760M and of 7B on v5e. Those of 7B
on the other chips were chosen by hand: `dots_and_attention`, with the fewest microbatches that
fit.

## Models and pods

{best}

Held-out evaluation needs much less memory than a step, because it has no gradients. With
parameters and optimizer state, its peak is {evaluations}.

## The options of the compiler

{presets}

[`config.loop.compiler`](train.md#options-of-the-compiler) names a preset. By default a step waits
for each collective. With a preset, asynchronous collectives run beside the arithmetic. A preset
does not change the bounds, which count only bytes and operations. It decides whether a step can
come near the MFU without brackets. The preset for GPUs cannot be planned, because their compiler
needs a GPU.

## 7B on v5p:8x8x4 with other meshes

{meshes}

If `fsdp` has all 256 chips (first row), each chip has 16 columns of an embedding. The compiler then
gathers and reduces by all-reduce, which sends twice the bytes. With 64 chips it does not.
`--search` tries other divisions of `data` and `fsdp`. Context parallelism (fourth row) gathers keys
and values: 2.1 GB a layer on each device. At this batch that is four times the weights. Ring
attention would send the same bytes in pieces and hold fewer of them at once. Rows of 4,096 tokens
need neither, so ring attention is not built.

## The image tokenizer and the retrieval encoder

{others}

The batches are those of the configs: 192 images of 256 px, and 32,768 pairs of an image and a text.
The encoder needs the size of its vocabulary (`--config.model.text.vocab_size`) if its text
tokenizer is not there. A step of the image tokenizer is counted with the discriminator, which
trains after step 50,000, and without reviving codes. The mesh has all chips on `data`. The image
tokenizer has no weights to split and no microbatches, so `--search` tries `model.remat` only. For
the encoder it also tries meshes. It never changes the batch, because this would change the
training.

## Generating with 7B

{generation}

Each row generates images of 1,024 tokens after a prompt of 3,072 (two retrieved documents), with
guidance, tensor parallel over all chips. *Cache* is that of both streams. The prompt of the
unconditional stream is short. Keys and values in 8 bits (the rows with "cache too") take a little
more than half. *Others* is the other memory at the peak of decoding. *Seconds* are the bound of the
roofline: weights and cache are read once a token, plus the collectives of the compiled loop. No run
is faster.

## What the numbers mean

*Peak* is the most that lives in the memory of one device at once, in the compiler's schedule:
parameters, optimizer state (both float32), and everything else. A TPU7x chip shows as two devices.
The compiler decides whether a program fits. It also needs room for packing, so its limit is a
little below the capacity of the chip. Near the limit it works harder, or refuses.

*Sent* is what one device sends in one step. It is read from the compiled program: the bytes of
every collective, by the ring algorithms, times the number of iterations of the loops around it.

The *bound* is a time that no step can beat. It is the longest of

- compute: all executed operations, recomputation included, at the peak of the chip;
- memory: operands and results of matrix products, gathered weights and the optimizer state, at the
  bandwidth of device memory;
- links: what is sent, at the bandwidth of all links of the chip together.

Operations and traffic of the decoder are counted from its shape (`leon_jax/plan/roofline.py`),
because XLA counts the body of a loop once. Those of the other models are counted from the matrix
products and convolutions of the traced step (`leon_jax/plan/products.py`). Nothing else is counted.
So a real run is slower: this is a bound, not a prediction.

*MFU at most* is the [MFU](train.md#goodput-and-utilisation) of a step that takes exactly the bound.
The number in brackets assumes that collectives never overlap with arithmetic. `--search` takes the
settings with the smallest sum of arithmetic and collectives.

*Days* are those of the paper's token budget (1.4, 1.9 and 2.4 trillion tokens) at the bound.
"""


class Results:
    """The plans of a folder, which has a JSON file for each command.

    Args:
      folder: the folder; created if missing.
      minutes: the longest processor time of a command. One that takes longer is ended.
    """

    def __init__(self, folder: pathlib.Path, minutes: int) -> None:
        self._folder, self._minutes = folder, minutes
        folder.mkdir(parents=True, exist_ok=True)

    def plan(self, *flags: str) -> dict:
        """Returns the plan.json of `leon plan` with these flags, from the folder or a new run.

        The key `missing` has the reason if there is no plan. `core_seconds` is the processor time.
        """
        name = hashlib.sha256(json.dumps(flags).encode()).hexdigest()[:16]
        path = self._folder / f"{name}.json"
        if path.exists():
            return json.loads(path.read_text())["plan"]
        print(*flags, file=sys.stderr, flush=True)
        before = _children_seconds()
        plan = self._run(flags)
        plan["core_seconds"] = round(_children_seconds() - before)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps({"flags": flags, "plan": plan}, indent=1))
        temporary.replace(path)
        return plan

    def _run(self, flags: tuple[str, ...]) -> dict:
        environment = {"TPU_LIBRARY_PATH": str(ROOT / ".tpu/libtpu/libtpu.so"), **os.environ}
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "leon_jax.cli.main", "plan", *flags]
            result = subprocess.run(
                [*command, f"--out={folder}"], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL,
                preexec_fn=self._limit,
            )  # fmt: skip
            if result.returncode == -signal.SIGXCPU:
                return {"missing": f"not compiled in {self._minutes} minutes of one core"}
            if result.returncode == DOES_NOT_FIT:
                return {"missing": "does not fit"}
            result.check_returncode()
            return json.loads(pathlib.Path(folder, "plan.json").read_text())

    def _limit(self) -> None:
        """Limits the processor time of this process."""
        seconds = 60 * self._minutes
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 10))


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def train_row(labels: list[str], content: dict, with_run: bool = True) -> str:
    """Returns a table row of a decoder's training; `with_run` adds its speed and days."""
    if reason := content.get("missing"):
        return f"| {' | '.join([*labels, reason])} |"
    setting, figures = content["setting"], content["figures"]
    cells = [*labels, f"{setting['remat']}, {setting['microbatches']}", *step_cells(content)]
    if with_run:
        cells += [f"{figures['tokens_per_second'] / 1e6:.2f}", f"{figures['days']:.1f}"]
    return f"| {' | '.join(cells)} |"


def other_row(labels: list[str], content: dict) -> str:
    """Returns a table row of the training of an image tokenizer or a retrieval encoder."""
    if reason := content.get("missing"):
        return f"| {' | '.join([*labels, reason])} |"
    figures = content["figures"]
    per_second = next(figures[f"{unit}_per_second"] for unit in ("pictures", "pairs")
                      if f"{unit}_per_second" in figures)  # fmt: skip
    is_recomputed = "yes" if content["setting"]["remat"] else "no"
    run = [f"{per_second:,.0f}", f"{figures['days']:.1f}"]
    return f"| {' | '.join([*labels, is_recomputed, *step_cells(content), *run])} |"


def step_cells(content: dict) -> list[str]:
    """Returns the cells of a training step: memory, traffic, bounds and MFU."""
    memory, figures, bound = content["memory"], content["figures"], content["rooflines"]["step"]
    sent = {kind: counts["bytes_sent"] / 1e9 for kind, counts in content["collectives"].items()}
    return [
        f"{memory['peak'] / GIB:.1f} of {memory['capacity'] / GIB:.0f}",
        f"{(memory['parameters'] + memory['optimizer']) / GIB:.2f}",
        " + ".join(f"{size:.1f} {kind}" for kind, size in sent.items() if size >= 0.05),
        f"{bound['compute']:.3g} / {bound['memory']:.3g} / {bound['links']:.3g}",
        f"**{100 * figures['mfu_bound']:.0f} %** ({100 * figures['mfu_serial']:.0f} %)",
    ]


def preset_row(labels: list[str], content: dict) -> str:
    """Returns a table row of a compiler preset, or of the compiler's defaults."""
    if reason := content.get("missing"):
        return f"| {' | '.join([*labels, reason])} |"
    memory, figures = content["memory"], content["figures"]
    counts = collections.Counter()
    for collective in content["collectives"].values():
        counts.update(collective)
    asynchronous = counts["asynchronous"]
    cells = [
        *labels,
        f"{memory['peak'] / GIB:.1f} of {memory['capacity'] / GIB:.0f}",
        f"{counts['bytes_sent'] / 1e9:.1f}",
        f"{counts['instructions'] - asynchronous} / {asynchronous}",
        f"{100 * figures['mfu_bound']:.1f} % ({100 * figures['mfu_serial']:.1f} %)",
    ]
    return f"| {' | '.join(cells)} |"


def decode_row(labels: list[str], content: dict) -> str:
    """Returns a table row of a decode plan."""
    if reason := content.get("missing"):
        return f"| {' | '.join([*labels, reason])} |"
    memory, figures = content["memory"], content["figures"]
    bound = content["rooflines"]["token"]
    sizes = [memory[name] / GIB for name in ("parameters", "cache", "activations", "peak")]
    cells = [
        *labels,
        *(f"{size:.2f}" for size in sizes),
        f"{memory['capacity'] / GIB:.0f}",
        f"{1e3 * bound['compute']:.2f} / {1e3 * bound['memory']:.2f} / {1e3 * bound['links']:.2f}",
        f"{figures['seconds_per_batch'] / content['setting']['rows']:.2f}",
        f"{figures['tokens_per_second']:,.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def table(head: list[str], rows: list[str]) -> str:
    """Returns a Markdown table."""
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *rows])


def best_flags(model: str, topology: str) -> list[str]:
    """Returns the flags of a row of the first table."""
    remat, microbatches = SETTINGS[model, topology]
    return [
        f"--config=configs/{CONFIGS[model]}.py",
        f"--topology={topology}",
        "--mesh=-1,64,1,1",
        f"--config.model.remat={remat}",
        f"--config.microbatches={microbatches}",
        *((EVALUATED,) if model == "7B" else ()),
    ]


def evaluation_sentence(plans: dict[str, dict]) -> str:
    """Returns the peak memory of evaluations, by the name of the model and the topology."""
    peaks = [
        f"{content['figures']['evaluation_peak'] / GIB:.1f} GiB ({name})"
        for name, content in plans.items()
        if not content.get("missing")
    ]
    return ", ".join(peaks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=pathlib.Path, default=pathlib.Path("out/plans"))
    parser.add_argument(
        "--minutes", type=int, default=40, help="processor time of one program at most"
    )
    arguments = parser.parse_args()
    plan = Results(arguments.results, arguments.minutes).plan
    plans = {labels: plan(*best_flags(*labels)) for labels in SETTINGS}
    best = [train_row(list(labels), content) for labels, content in plans.items()]
    evaluated = {
        f"{model} on {topology}": content
        for (model, topology), content in plans.items()
        if model == "7B"
    }
    meshes = []
    for mesh in MESHES:
        content = plan("--config=configs/cm3leon_7b.py", "--topology=v5p:8x8x4", f"--mesh={mesh}")
        meshes.append(train_row([mesh.replace(",", " x ")], content, with_run=False))
    others = []
    for name, flags in OTHERS:
        for topology in SMALL_PODS:
            content = plan(*flags, f"--topology={topology}", EVALUATED)
            evaluated[f"{name} on {topology}"] = content
            others.append(other_row([name, topology], content))
    decoding = []
    for topology, rows, weights, cache in DECODING:
        content = plan(
            "--config=configs/cm3leon_7b.py", "--program=decode", f"--topology={topology}",
            f"--rows={rows}", f"--weights={weights}", f"--cache={cache}",
        )  # fmt: skip
        dtypes = weights if cache == "compute" else f"{weights}, cache too"
        decoding.append(decode_row([topology, str(rows), dtypes], content))
    presets = []
    for topology in WITH_PRESET:
        flags = best_flags("7B", topology)
        chip = topology.partition(":")[0]
        presets.append(preset_row([topology, "none"], plan(*flags)))
        presets.append(
            preset_row([topology, f"`{chip}`"], plan(*flags, f"--config.loop.compiler={chip}"))
        )
    step_columns = [
        "peak, GiB",
        "state, GiB",
        "sent, GB",
        "compute / memory / links, s",
        "MFU at most (nothing hidden)",
    ]
    columns = ["remat, microbatches", *step_columns]
    best_table = table(["model", "topology", *columns, "million tokens/s", "days"], best)
    others_table = table(["model", "topology", "remat", *step_columns, "images/s", "days"], others)
    presets_table = table(
        ["topology", "preset", "peak, GiB", "sent, GB", "collectives: synchronous / asynchronous",
         "MFU at most (nothing hidden)"],
        presets,
    )  # fmt: skip
    meshes_table = table(["data x fsdp x context x tensor", *columns], meshes)
    decoding_table = table(
        ["topology", "images at once", "weights", "weights, GiB", "cache, GiB", "others, GiB",
         "peak, GiB", "of GiB", "a token: compute / memory / links, ms",
         "seconds an image at least", "tokens/s at most"],
        decoding,
    )  # fmt: skip
    text = PAGE.format(
        best=best_table,
        presets=presets_table,
        evaluations=evaluation_sentence(evaluated),
        meshes=meshes_table,
        others=others_table,
        generation=decoding_table,
    )
    page = ROOT / "docs" / "plans.md"
    temporary = page.with_name(page.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(page)


if __name__ == "__main__":
    main()
