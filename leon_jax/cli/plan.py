"""Estimates the memory and speed of a config on a TPU pod, without the pod.

    leon plan --config=configs/cm3leon_7b.py --topology=v5p:8x8x4

Compiles the training step of a decoder, an image tokenizer or a retrieval encoder with the TPU
compiler and reports memory, collectives and a roofline estimate of the time. With --program=decode
it compiles the image generation program of a decoder. The compiler runs on any Linux machine,
without a TPU, an account or a network. Install it with pip install 'leon_jax[tpu]'.

    leon plan --config=configs/vqgan_256.py --topology=v5e:4x4 --search
    leon plan --config=configs/clip_b32.py --config.model.text.vocab_size=49408 --topology=v5e:4x4

config.loop.compiler names options of the compiler, for example auto. The plan says what they
change. With config.loop.eval_every it also has the memory of the evaluation.

No data is read. A retrieval encoder needs its text tokenizer, or the size of its vocabulary.

    leon plan --program=decode --model=models/cats --topology=v5e:2x2

With --program=decode, --model takes the place of --config: a model folder, or a .tar of one.

--search looks for the fastest setting that fits in memory, or for the smallest change that makes
the config fit. The exit code is 3 if the program does not fit.

Topologies: v4:AxBxC, v5e:AxB, v5p:AxBxC, v6e:AxB, tpu7x:AxBxC.
"""

import json
import os
import pathlib
import sys

# Set before JAX is imported. The program is compiled and never run, and libtpu must not look for a
# TPU machine.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
# Plans use no device, so several may run at once.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

from absl import flags

from leon_jax import config as configs
from leon_jax.cli import config_flag
from leon_jax.config import UserError

FLAGS = flags.FlagValues()
_CONFIG = config_flag.define(FLAGS)
_MODEL = flags.DEFINE_string(
    "model", None, "A model folder, or a .tar of one (decode); takes the place of --config.",
    flag_values=FLAGS,
)  # fmt: skip
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "A chip and a shape, for example v5p:8x8x4 or v5e:4x4.", flag_values=FLAGS
)
_PROGRAM = flags.DEFINE_enum(
    "program", "train", ["train", "decode"], "The program to compile.", flag_values=FLAGS
)
_MESH = flags.DEFINE_list(
    "mesh",
    None,
    "Sizes of the axes data,fsdp,context,tensor; one may be -1. The default is config.loop.mesh "
    "for train and -1,1,1,8 for decode.",
    flag_values=FLAGS,
)
_SEARCH = flags.DEFINE_bool(
    "search",
    False,
    "Search remat policies, microbatches and meshes, as far as the kind of model has them, for the "
    "fastest setting that fits, or for the smallest change that makes the config fit (train).",
    flag_values=FLAGS,
)
_ROWS = flags.DEFINE_integer(
    "rows", 32, "Images in a batch (decode).", lower_bound=1, flag_values=FLAGS
)
_GUIDANCE = flags.DEFINE_float(
    "guidance", None, "Classifier-free guidance weight (decode); by default the model's, or 3.",
    flag_values=FLAGS,
)  # fmt: skip
_PROMPT = flags.DEFINE_integer(
    "prompt",
    None,
    "Tokens in a prompt (decode); the default is the context length less an image's tokens.",
    lower_bound=1,
    flag_values=FLAGS,
)
_WEIGHTS = flags.DEFINE_enum(
    "weights", "bfloat16", ["float32", "bfloat16", "int8"], "The dtype of weights (decode).",
    flag_values=FLAGS,
)  # fmt: skip
_CACHE = flags.DEFINE_enum(
    "cache", "compute", ["compute", "int8"],
    "The dtype of cached keys and values: compute is config.model.dtype (decode).",
    flag_values=FLAGS,
)  # fmt: skip
_OUT = flags.DEFINE_string("out", None, "A folder for plan.json and index.html.", flag_values=FLAGS)

KINDS = ("decoder", "tokenizer", "encoder")
DOES_NOT_FIT = 3


def main(argv: list[str]) -> None:
    """Runs `leon plan`.

    Raises:
      UserError: a flag or the config is invalid, or the compiler is not installed.
      SystemExit: the program does not fit in memory; code 3.
    """
    del argv
    if _MODEL.value and (_CONFIG.present or _PROGRAM.value != "decode"):
        raise UserError("--model is for --program=decode, and takes the place of --config")
    values = {} if _MODEL.value else config_flag.read(_CONFIG, "configs/cm3leon_7b.py")
    if not _TOPOLOGY.value:
        raise UserError("--topology is missing; for example --topology=v5p:8x8x4")
    is_decode = _PROGRAM.value == "decode"
    known = KINDS[:1] if is_decode else KINDS
    if values and values.get("kind") not in known:
        raise UserError(
            f"config.kind is {values.get('kind')!r}; leon plan --program={_PROGRAM.value} needs "
            f"{' or '.join(map(repr, known))}"
        )

    from leon_jax.plan import kinds, plan_page, topology
    from leon_jax.plan.plan import DoesNotFit
    from leon_jax.train.training_loop import LoopConfig

    loop = configs.build(LoopConfig, values.pop("loop", {}), "config.loop")
    kind = kinds.DecoderKind(_of_model()) if _MODEL.value else kinds.make(values["kind"], values)
    pod = topology.find(_TOPOLOGY.value)
    try:
        plan = _decode(kind.config, pod) if is_decode else _train(kind, loop, pod)
    except DoesNotFit as error:
        print(f"leon plan: the program does not fit {pod.name}: {error}", file=sys.stderr)
        if not is_decode:
            print("leon plan: --search looks for the smallest change that fits", file=sys.stderr)
        raise SystemExit(DOES_NOT_FIT) from error
    source = _MODEL.value or _config_path()
    print(plan_page.text(plan, source))
    if _OUT.value:
        folder = pathlib.Path(_OUT.value)
        _write(folder / "plan.json", json.dumps({"config": source} | plan.to_json(), indent=1))
        _write(folder / "index.html", plan_page.page(plan, source))
        print(f"leon plan: wrote {folder / 'plan.json'} and index.html", file=sys.stderr)


def _train(kind, loop, pod):
    from leon_jax.plan import search, train
    from leon_jax.plan.kinds import Setting
    from leon_jax.train import compiler_presets

    if loop.slices > 1:
        raise UserError(f"config.loop.slices is {loop.slices}; leon plan supports one slice only")
    setting = kind.setting(_mesh(loop.mesh, pod))
    options = compiler_presets.options(loop.compiler, pod.devices[0])
    if _SEARCH.value and options:
        raise UserError(
            "--search compares defaults of the compiler; leave config.loop.compiler empty"
        )
    if not _SEARCH.value:
        return train.plan(kind, pod, setting, options, is_evaluated=loop.eval_every > 0)
    plan = search.search(
        kind, pod, setting, lambda line: print(f"leon plan: {line}", file=sys.stderr, flush=True)
    )
    if plan is None:
        print(f"leon plan: no setting of the search fits {pod.name}", file=sys.stderr)
        raise SystemExit(DOES_NOT_FIT)
    if change := Setting(**plan.setting).changes(setting):
        print(f"leon plan: with {change}", file=sys.stderr)
    return plan


def _of_model():
    """Returns a training configuration with the decoder of --model; only its shape matters."""
    from leon_jax.data.config import DataConfig
    from leon_jax.model_folder import ModelFolder
    from leon_jax.train.decoder_config import DecoderTraining
    from leon_jax.train.optimizer import OptimizerConfig

    folder = ModelFolder.open(_MODEL.value)
    data = DataConfig(image_shape=folder.tokenizer.image_shape, length=folder.context)
    vocabulary, optimizer = folder.tokenizer.vocabulary, OptimizerConfig(0.0, total_steps=1)
    return DecoderTraining(folder.config, vocabulary, optimizer, batch_size=1, steps=1, data=data)


def _guidance() -> float:
    """Returns --guidance, or else the weight of the model's default guidance, or 3."""
    from leon_jax.model_folder import ModelFolder

    if _GUIDANCE.value is not None or not _MODEL.value:
        return 3.0 if _GUIDANCE.value is None else _GUIDANCE.value
    return getattr(ModelFolder.open(_MODEL.value).defaults.sampling.guidance, "weight", 1.0)


def _decode(config, pod):
    from leon_jax.plan import decode

    rows, columns = config.data.image_shape
    max_prompt = config.model.max_length - rows * columns
    prompt = max_prompt if _PROMPT.value is None else _PROMPT.value
    mesh = _mesh((-1, 1, 1, min(8, len(pod.devices))), pod)
    setting = decode.Setting(
        mesh,
        _ROWS.value,
        _guidance(),
        prompt,
        _WEIGHTS.value,  # type: ignore[arg-type]  # absl checks the values
        _CACHE.value,  # type: ignore[arg-type]
    )
    return decode.plan(config, pod, setting)


def _mesh(default, pod) -> tuple[int, ...]:
    """Returns the axis sizes of --mesh, or else of `default`, with -1 resolved."""
    from leon_jax import sharding

    sizes = default
    if _MESH.value is not None:
        try:
            sizes = tuple(int(size) for size in _MESH.value)
        except ValueError as error:
            raise UserError(
                f"--mesh={','.join(_MESH.value)} must be four whole numbers, for example -1,64,1,1"
            ) from error
    try:
        return tuple(sharding.make_mesh(sizes, pod.devices).shape.values())
    except ValueError as error:
        name = "config.loop.mesh" if _MESH.value is None else "--mesh"
        raise UserError(f"{name}: {error}") from error


def _config_path() -> str:
    """Returns the path of --config as the user wrote it."""
    return str(FLAGS["config"].config_filename)  # type: ignore[attr-defined]


def _write(path: pathlib.Path, content: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(content, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"--out: {path} cannot be written: {error.strerror}") from error
