"""Tests the flags, exit codes and output of `leon plan`."""

import json
import re
import subprocess
import sys

import pytest

from leon_jax.cli import main
from leon_jax.convert import torch_file
from leon_jax.model_folder import ModelFolder
from tests import tiny, tpu
from tests.convert import small_gpt

TINY = """
import pathlib, runpy

def get_config():
    base = runpy.run_path({base!r})["make"]
    config = base(layers=2, embed=512, heads=4, learning_rate=1e-3, tokens=1e12)
    config.batch_size = 1024
    config.model.remat = "none"
    return config
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(TINY.format(base=str(tpu.ROOT / "configs" / "cm3leon_base.py")))
    return path


def leon_plan(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "leon_jax.cli.main", "plan", *flags],
        env=tpu.environment(),
        cwd=tpu.ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_a_program_that_does_not_fit_exits_3_and_search_names_the_smallest_change(config, tmp_path):
    flags = f"--config={config}", "--topology=v5e:2x2"
    result = leon_plan(*flags)
    assert result.returncode == 3
    sentence = r"does not fit v5e:2x2: it needs at least [\d.]+ GiB of memory, and .* 15\.\d+ GiB\n"
    assert re.search(sentence, result.stderr) and "--search" in result.stderr
    assert "Traceback" not in result.stderr

    result = leon_plan(*flags, "--search", f"--out={tmp_path}")
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("leon plan: ")]
    change = next(line for line in lines if "fits," in line).split(": ")[1]
    assert change.startswith("--config.") and f"leon plan: with {change}" in lines
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["memory"]["peak"] < plan["memory"]["capacity"]
    # The printed change alone makes the config fit.
    assert leon_plan(*flags, *change.split()).returncode == 0


@pytest.mark.slow
def test_the_plan_on_the_terminal_and_on_the_page_agree(config, tmp_path):
    result = leon_plan(
        f"--config={config}", "--topology=v6e:2x2", "--mesh=1,2,1,2",
        "--config.batch_size=64", f"--out={tmp_path}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    weights = 2 * (4 * 512**2 + 2 * 512 * 2048) + (65536 + 4096) * 512
    assert plan["parameters"] == weights
    # Split over fsdp and tensor; positions over fsdp only. Adam keeps two more of everything.
    split = (weights - 4096 * 512) / 4 + 4096 * 512 / 2
    assert plan["memory"]["parameters"] == 4 * split
    assert plan["memory"]["optimizer"] == pytest.approx(8 * split)
    figures, bound = plan["figures"], plan["rooflines"]["step"]
    assert figures["tokens_per_step"] == 64 * 4096
    assert bound["seconds"] == max(bound["compute"], bound["memory"], bound["links"])
    assert figures["mfu_bound"] == pytest.approx(
        figures["flops_per_step"] / (bound["seconds"] * 4 * 918e12)
    )
    assert 0 < figures["mfu_serial"] < figures["mfu_bound"] < 1
    page = (tmp_path / "index.html").read_text()
    assert f"{100 * figures['mfu_bound']:.1f} %" in page and page.count("<svg") == 2
    for line in ("parameters", "all-reduce", "MFU at most", "chip-hours"):
        assert line in result.stdout and line in page


@pytest.mark.slow
def test_image_generation_can_be_planned(config, tmp_path):
    result = leon_plan(
        f"--config={config}", "--topology=v5e:2x2", "--program=decode", "--rows=4",
        "--mesh=-1,1,1,4", "--prompt=128", f"--out={tmp_path}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert set(plan["rooflines"]) == {"prefill", "token"}
    assert plan["collectives"]["all-gather"]["runs"] < 100, "no weights are gathered for a token"
    total = plan["rooflines"]["prefill"]["seconds"] + 1024 * plan["rooflines"]["token"]["seconds"]
    assert plan["figures"]["pictures_per_second"] == pytest.approx(4 / total)


def test_every_kind_of_chip_has_its_devices_and_a_mesh():
    program = (
        "from leon_jax import sharding\n"
        "from leon_jax.plan import topology\n"
        "from leon_jax.train.peak_flops import CHIPS\n"
        "for chip in (chip for chip in CHIPS if chip.ici_bandwidth):\n"
        "    pod = topology.find(chip.name + ':' + ('2x2x2' if chip.torus == 3 else '2x4'))\n"
        "    mesh = sharding.make_mesh((-1, 4, 1, 1), pod.devices)\n"
        "    assert {device.device_kind for device in pod.devices} <= set(chip.kinds)\n"
        "    print(chip.name, pod.chips, mesh.size, chip.devices * pod.chips)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], env=tpu.environment(), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [line[0] for line in lines] == ["v4", "v5e", "v5p", "v6e", "tpu7x"]
    assert all(chips == "8" and size == devices for _, chips, size, devices in lines)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology=v5p"], "must be a chip and a shape"),
        (["--topology=v9z:2x2"], "the chips are v4:AxBxC, v5e:AxB, v5p:AxBxC"),
        (["--topology=v5e:4x4x4"], "must be a chip and a shape"),
        (["--topology=v5e:3x5"], "--topology=v5e:3x5 is not a shape of v5e that"),
        (["--topology=v5e:2x2", "--mesh=3,1,1,1"], "--mesh: mesh"),
        (["--topology=v5e:2x2", "--mesh=a,1,1,1"], "--mesh=a,1,1,1 must be four whole numbers"),
        (["--topology=v5e:2x2", "--config.batch_size=6"], "must be a multiple of data x fsdp"),
        (["--topology=v5e:2x2", "--program=decode", "--prompt=4000"], "--prompt=4000"),
        ([], "--topology is missing"),
    ],
)
def test_invalid_flags_give_one_sentence(config, flags, message):
    result = leon_plan(f"--config={config}", *flags)
    assert result.returncode == 2
    assert message in result.stderr and result.stderr.count("\n") == 1


VQGAN, CLIP = "--config=configs/vqgan_256.py", "--config=configs/clip_b32.py"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--config=configs/emoji/text.py"],
            "config.kind is 'text'; leon plan --program=train needs 'decoder' or 'tokenizer' or",
        ),
        ([VQGAN, "--program=decode"], "config.kind is 'tokenizer'; leon plan --program=decode"),
        ([VQGAN, "--config.batch_size=6"], "config.batch_size is 6; it must be a multiple of data"),
        (
            [CLIP, "--config.batch_size=6", "--config.model.text.vocab_size=49408"],
            "config.batch_size is 6; it must be a multiple of data x fsdp, 4",
        ),
        (
            [CLIP, "--config.data.text=nowhere.json"],
            "config.data.text is 'nowhere.json', which is no file; name the text tokenizer, or set "
            "the size of the vocabulary, for example --config.model.text.vocab_size=49408",
        ),
    ],
)
def test_what_cannot_be_planned_gives_one_sentence(flags, message):
    result = leon_plan("--topology=v5e:2x2", *flags)
    assert result.returncode == 2
    assert message in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_search_for_a_tokenizer_names_what_it_tried():
    # The attention at 128 x 128 positions needs more than the memory, with recomputation too.
    result = leon_plan(
        VQGAN, "--topology=v5e:2x2", "--config.model.channels=32", "--config.model.blocks=1",
        "--config.model.multipliers=(1,1)", "--config.model.attention_sizes=()",
        "--config.losses.network=alexnet", "--config.batch_size=320", "--search",
    )  # fmt: skip
    assert result.returncode == 3
    assert "as configured: does not fit: it needs at least" in result.stderr
    assert "--config.model.remat=True: does not fit: it needs at least" in result.stderr
    assert "no setting of the search fits v5e:2x2" in result.stderr


@pytest.mark.slow
def test_an_encoder_is_planned_without_its_text_tokenizer(tmp_path):
    result = leon_plan(
        CLIP, "--topology=v5e:2x2", "--mesh=1,2,1,2", "--config.batch_size=64",
        "--config.model.text.vocab_size=1000", "--config.model.vision.layers=2",
        "--config.model.text.layers=2", f"--out={tmp_path}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    figures, bound = plan["figures"], plan["rooflines"]["step"]
    # Weights are split over fsdp and most of them over tensor.
    assert 1 / 4 < plan["memory"]["parameters"] / (4 * plan["parameters"]) < 1 / 2
    assert 1 < figures["executed_flops_per_step"] / figures["flops_per_step"] < 4 / 3
    assert figures["pairs_per_second"] == 64 / bound["seconds"]
    assert "pairs of image and text a second at most" in result.stdout


def test_a_missing_compiler_gives_the_install_command(config):
    environment = tpu.environment()
    del environment["TPU_LIBRARY_PATH"]
    result = subprocess.run(
        [sys.executable, "-m", "leon_jax.cli.main", "plan", f"--config={config}",
         "--topology=v5e:2x2"],
        env=environment, cwd=tpu.ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 2 and "pip install 'leon_jax[tpu]'" in result.stderr


@pytest.mark.slow
def test_a_model_folder_takes_the_place_of_a_config(tmp_path):
    flags = f"--model={tiny.folders()[0]}", "--topology=v5e:2x2", "--mesh=4,1,1,1", "--rows=4"
    result = leon_plan("--program=decode", *flags, f"--out={tmp_path}")
    assert result.returncode == 0, result.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["parameters"] == ModelFolder.open(tiny.folders()[0]).config.parameter_count()
    assert plan["setting"]["guidance"] == 3.0
    result = leon_plan(*flags)
    assert result.returncode == 2 and "--model is for --program=decode" in result.stderr


@pytest.mark.slow
def test_a_converted_gpt_is_planned_with_a_prompt_of_one_token(tmp_path):
    torch_file.write(tmp_path / "gpt.pt", small_gpt.random_gpt(dim=512, hidden=1024), "model")
    small_gpt.write_vqgan(tmp_path / "vqgan.pt")
    assert main.run(["convert", *small_gpt.flags(tmp_path), "--nocheck"]) == 0
    flags = f"--model={tmp_path}/model", "--topology=v5e:2x2", "--mesh=1,1,1,4", "--rows=4"
    result = leon_plan("--program=decode", *flags, f"--out={tmp_path}")
    assert result.returncode == 0, result.stderr
    setting = json.loads((tmp_path / "plan.json").read_text())["setting"]
    assert (setting["prompt"], setting["guidance"], setting["rows"]) == (1, 4.0, 4)
