"""`leon generate`: a mistake of the user is one sentence, exit code 2, and no trace."""

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.PngImagePlugin
import pytest

from leon_jax.cli import main
from leon_jax.generate.journal import file_name
from leon_jax.leon import Leon
from tests import tiny

PROMPT = f"--prompt={tiny.PROMPT}"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs `leon generate` with the tiny model in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    checkpoint, prepared = tiny.folders()

    def command(*arguments: str, verb: str = "generate") -> tuple[int, str, str]:
        named = [f"--model={checkpoint}", f"--index={prepared}"] if verb == "generate" else []
        code = main.run([verb, *named, *arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return command


@pytest.fixture
def no_weights(monkeypatch):
    """Fails if a model is loaded: everything here must be found before."""

    def load(*arguments):
        raise AssertionError("the weights were loaded before the arguments were checked")

    monkeypatch.setattr(Leon, "load", load)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def png_header(width: int, height: int) -> bytes:
    """A PNG file that claims this size, and holds no pixels."""
    content = b"\x89PNG\r\n\x1a\n"
    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    for chunk in (b"IHDR" + size, b"IDAT", b"IEND"):
        content += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return content


def whole_png(tmp_path: Path) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    PIL.Image.fromarray(noise).save(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "whole.png").unlink()
    return content


@pytest.mark.usefixtures("no_weights")
class TestRefusals:
    def refused(self, run, tmp_path, arguments, message):
        before = files(tmp_path)
        code, out, err = run(*arguments)
        assert code == 2
        assert out == ""
        assert err.startswith("leon generate: ") and err.endswith("\n") and err.count("\n") == 1
        assert message in err
        assert "Traceback" not in err and len(err) < 500
        assert files(tmp_path) == before

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "--prompt is missing"),
            (["--prompt="], "prompt is empty"),
            (["--prompt=  \n "], "prompt is empty"),
            (["--prompt=" + "x y " * 2500], "9999 characters"),
            ([PROMPT, "--guidance=-1"], "guidance is -1"),
            ([PROMPT, "--guidance=nan"], "guidance is nan"),
            ([PROMPT, "--guidance=much"], "--guidance=much"),
            ([PROMPT, "--num_images=0"], "num_images is 0"),
            ([PROMPT, "--num_images=-3"], "num_images is -3"),
            ([PROMPT, "--num_images=2.5"], "--num_images=2.5"),
            ([PROMPT, "--num_docs=9"], "holds at most"),
            ([PROMPT, "--num_docs=-1"], "num_docs is -1"),
            ([PROMPT, "--top_p=0"], "top_p is 0"),
            ([PROMPT, "--top_p=1.1"], "top_p is 1.1"),
            ([PROMPT, "--temperature=-0.5"], "temperature is -0.5"),
            ([PROMPT, "--seed=-1"], "seed is -1"),
            ([PROMPT, "--task=sing"], "text_to_image"),
            ([PROMPT, "--image=cat.png"], "--task=caption"),
            ([PROMPT, "--guidence=3"], "guidence"),
            ([PROMPT, "cat"], "'cat' is not a flag"),
            ([PROMPT, "--out=/proc/leon"], "cannot write into /proc/leon"),
            ([PROMPT, "--out=/dev/null/x"], "/dev/null is not a folder"),
            ([PROMPT, "--model=nowhere"], "there is no model folder nowhere"),
            ([PROMPT, "--index=nowhere"], "nowhere is not a prepared folder"),
            (["--task=caption"], "--image is missing"),
            (["--task=caption", "--image=none.png"], "there is no image at none.png"),
            (["--task=caption", "--image=."], "is not a file"),
            (["--task=caption", "--image=x", "--num_docs=9"], "holds at most"),
            (["--task=caption", "--image=x", PROMPT], "--task=text_to_image"),
        ],
        ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
    )
    def test_arguments(self, run, tmp_path, arguments, message):
        self.refused(run, tmp_path, arguments, message)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "is empty"),
            (b"just some text, not a picture", "not an image"),
            (b"\x89PNG\r\n\x1a\n", "not an image"),
            (lambda folder: whole_png(folder)[:-6000], "damaged or truncated"),
            (lambda folder: whole_png(folder)[:60], "damaged or truncated"),
            (png_header(50_000, 50_000), "too many pixels"),
            (png_header(50_000, 10), "50000 x 10 pixels"),
            (png_header(12_000, 12_000), "12000 x 12000 pixels"),
            (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "shows nothing"),
            (b"<html><body><svg></svg></body></html>", "not an image"),
            (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_pictures(self, run, tmp_path, content, message):
        content = content(tmp_path) if callable(content) else content
        (tmp_path / "cat.png").write_bytes(content)
        self.refused(run, tmp_path, ["--task=caption", "--image=cat.png"], message)

    def test_a_file_in_the_way_of_the_folder(self, run, tmp_path):
        (tmp_path / "taken").write_text("")
        self.refused(run, tmp_path, [PROMPT, "--out=taken"], "taken is not a folder")
        self.refused(run, tmp_path, [PROMPT, "--out=taken/more"], "taken is not a folder")


def test_pictures_are_written_with_their_story(run, tmp_path):
    code, out, err = run(PROMPT, "--num_images=2", "--seed=7", "--guidance=2", "--out=a/b")
    assert (code, err) == (0, "")
    names = [f"a/b/{file_name(tiny.PROMPT, seed)}" for seed in (7, 8)]
    assert out.splitlines()[:2] == names
    assert "retrieved:" in out and "CC-BY" in out
    assert files(tmp_path) == {"a", "a/b", "a/b/generated.jsonl", *names}
    with PIL.Image.open(tmp_path / names[1]) as picture:
        assert picture.size == (tiny.RESOLUTION, tiny.RESOLUTION)
        assert {"prompt", "seed", "model", "guidance", "retrieved"} <= set(picture.text)
        assert (picture.text["prompt"], picture.text["seed"]) == (tiny.PROMPT, "8")
        for document in json.loads(picture.text["retrieved"]):
            assert {"key", "source", "licence", "attribution"} <= set(document)


def test_a_caption_is_printed_with_what_was_read(run, tmp_path):
    PIL.Image.new("RGBA", (40, 30), (255, 0, 0, 128)).save(tmp_path / "red.png")
    code, out, err = run("--task=caption", "--image=red.png", "--num_docs=1")
    assert (code, err) == (0, "")
    assert "retrieved:" in out and "authors" in out
    assert files(tmp_path) == {"red.png"}


def test_a_write_that_fails_leaves_no_half_picture(run, tmp_path, monkeypatch):
    def full(*arguments, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    code, _, err = run(PROMPT, "--num_docs=0", "--num_images=1")
    assert code == 2 and "No space left on device" in err
    assert files(tmp_path) == {"out"}


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("cat face, Twemoji style", "cat-face-twemoji-style"),
        ("../../etc/passwd", "etc-passwd"),
        ("日本", "日本"),
        ("!!!", "image"),
        ("a" * 300, "a" * 60),
        ("𐐨" * 300, "𐐨" * 30),  # of four bytes
    ],
)
def test_file_names_stay_inside_the_folder(prompt, name):
    assert (
        file_name(prompt, 7) == f"{name}-{hashlib.sha256(prompt.encode()).hexdigest()[:12]}-7.png"
    )


def test_control_c_is_exit_code_130(run, monkeypatch):
    def load(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(Leon, "load", load)
    code, _, err = run(PROMPT)
    assert (code, err) == (130, "leon generate: interrupted\n")


def test_help_version_and_unknown_verbs(run, capsys):
    assert main.run([]) == 2
    assert main.run(["--help"]) == 0
    assert "leon generate" in capsys.readouterr().out
    assert main.run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("leon 0.")
    assert main.run(["genrate"]) == 2
    assert "did you mean 'generate'?" in capsys.readouterr().err
    for verb, flag in (("generate", "--num_images"), ("prepare", "--data_dir")):
        code, out, _ = run("--help", verb=verb)
        assert code == 0 and flag in out


def test_flags_start_anew_with_every_command(run):
    assert "guidance is -1" in run(PROMPT, "--guidance=-1")[2]
    assert "num_images is 0" in run(PROMPT, "--num_images=0")[2]


def test_the_process_ends_with_the_exit_code(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "leon_jax.cli.main", "generate", "--model=nowhere", PROMPT],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 2
    assert done.stderr.startswith("leon generate: there is no model folder nowhere")
    assert done.stderr.count("\n") == 1 and done.stdout == ""


def test_a_file_of_prompts_is_drawn_and_gone_on_with(run, tmp_path):
    lines = [tiny.PROMPT, "", "cat " * 900, "a dog", "a dog", "日" * 20]
    (tmp_path / "prompts.txt").write_text("\n".join(lines), encoding="utf-8")
    asked = "--prompts=prompts.txt", "--num_images=2", "--num_docs=0", "--seed=7"
    code, said, error = run(*asked)
    assert code == 2 and "line 3: the prompt has 3599 characters" in error
    assert "1 of 4 prompts have no images" in error
    drawn = sorted((tmp_path / "out").glob("*.png"))
    assert set(said.split()) == {str(path.relative_to(tmp_path)) for path in drawn}
    stories = [(text["prompt"], text["seed"]) for text in map(story, drawn)]
    assert sorted(stories) == sorted(
        (lines[line - 1], str(seed)) for line in (1, 4, 6) for seed in (7, 8)
    )
    # Gone on with: what is there stays, also where the lines have another order.
    gone, *_, kept = (path for path in drawn if path.name.startswith("a-dog"))
    before, times = gone.read_bytes(), kept.stat().st_mtime_ns
    gone.unlink()
    (tmp_path / "prompts.txt").write_text("\n".join(["a dog!", *lines[::-1]]), encoding="utf-8")
    code, said, _ = run(*asked)
    assert "2 of 5 prompts have their images already" in said
    assert gone.read_bytes() == before and len(list((tmp_path / "out").glob("*.png"))) == 8
    assert [path.stat().st_mtime_ns for path in drawn if path.name.startswith("cat")] <= [times] * 2


def story(path: Path) -> dict[str, str]:
    """Returns the metadata of an image."""
    with PIL.Image.open(path) as picture:
        return picture.text


@pytest.mark.parametrize(
    "other",
    ["--guidance=2", "--temperature=0.5", "--top_p=0.5", "--top_k=3", "--num_docs=1", "--seed=8",
     "--best_of=2", "--weights=int8", "--cache=int8"],
)  # fmt: skip
def test_pictures_that_were_drawn_in_another_way_are_drawn_anew(run, tmp_path, other):
    (tmp_path / "prompts.txt").write_text("a dog")
    asked = "--prompts=prompts.txt", "--num_images=1", "--num_docs=0", "--seed=7"
    assert run(*asked)[0] == 0
    code, said, _ = run(*asked)
    assert code == 0 and "1 of 1 prompts have their images already" in said
    code, said, _ = run(*asked, other)
    assert code == 0 and "already" not in said and said.endswith(".png\n")
    code, said, _ = run(*asked, other)
    assert code == 0 and "1 of 1 prompts have their images already" in said


def test_pictures_of_other_weights_are_drawn_anew(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("a dog")
    model = tmp_path / "other" / tiny.folders()[0].name
    shutil.copytree(tiny.folders()[0], model)
    asked = "--prompts=prompts.txt", "--num_images=1", "--num_docs=0", f"--model={model}"
    assert run(*asked)[0] == 0
    assert "1 of 1 prompts have their images already" in run(*asked)[1]
    weights = bytearray((model / "decoder.safetensors").read_bytes())
    weights[-1000:] = bytes(1000)
    (model / "decoder.safetensors").write_bytes(weights)
    assert "already" not in run(*asked)[1]


def test_a_file_that_lies_in_the_folder_stops_nothing(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("a dog")
    asked = "--prompts=prompts.txt", "--num_images=1", "--num_docs=0"
    assert run(*asked)[0] == 0
    (drawn,) = (tmp_path / "out").glob("*.png")
    text = PIL.PngImagePlugin.PngInfo()
    text.add_text("much", "x" * 2_000_000, zip=True)
    for name, content in (("1", b""), ("2", b"no picture")):
        drawn.with_stem(f"{drawn.stem[:-1]}{name}").write_bytes(content)
    PIL.Image.new("RGB", (4, 4)).save(drawn.with_stem(f"{drawn.stem[:-1]}3"), pnginfo=text)
    assert "1 of 1 prompts have their images already" in run(*asked)[1]


def test_what_is_warmed_is_compiled_and_nothing_is_drawn(run, tmp_path):
    code, said, _ = run("--warm", "--num_images=2", "--num_docs=0", "--top_k=3")
    assert code == 0 and said.startswith("compiled for 3 lengths of prompts; kept in ")
    assert not (tmp_path / "out").exists()
    assert run("--warm", "--num_docs=99")[0] == 2
    assert run("--warm", "--best_of=2", "--num_images=4")[0] == 2


def test_small_weights_and_caches(run, tmp_path):
    code, _, error = run(PROMPT, "--num_images=1", "--weights=int8", "--cache=int8")
    assert (code, error) == (0, "") and len(list((tmp_path / "out").glob("*.png"))) == 1


def test_the_best_of_several_are_written(run, tmp_path):
    code, _, _ = run(PROMPT, "--num_images=1", "--best_of=3", "--num_docs=0")
    assert code == 0 and len(list((tmp_path / "out").glob("*.png"))) == 1
    code, _, error = run(PROMPT, "--num_images=4", "--best_of=3")
    assert code == 2 and "--best_of is 3; it must be at least num_images, 4" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts=none.txt"], "cannot read the prompts in none.txt: No such file"),
        (["--prompts=empty.txt"], "empty.txt holds no prompts; write one a line"),
        (["--prompts=empty.txt", PROMPT], "--prompt is given beside --prompts"),
    ],
)
def test_a_file_of_prompts_that_cannot_be_used_is_named(
    run, no_weights, tmp_path, arguments, message
):
    (tmp_path / "empty.txt").write_text("\n  \n")
    code, _, error = run(*arguments)
    assert code == 2 and message in error and not (tmp_path / "out").exists()
