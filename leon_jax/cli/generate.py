"""Draws pictures for a prompt, or writes a caption for a picture.

    leon generate --prompt="cat face, Twemoji style" --num_images=4 --out=pictures
    leon generate --prompts=prompts.txt --num_images=1 --out=pictures
    leon generate --task=caption --image=cat.png

The model that comes with the package is used unless --checkpoint names another. Each picture is a
PNG that carries its prompt, seed, guidance, model and the retrieved documents' licences as text.

A file of prompts has one a line. Their pictures are written as they are done, and a prompt whose
pictures are there is passed over, so the same command goes on after it was stopped.
"""

import glob
import os
import pathlib
import re
import sys
from collections.abc import Sequence

import jax
from absl import flags
from tqdm import tqdm

from leon_jax.config import UserError
from leon_jax.data import pictures
from leon_jax.decode.checkpoint import CAPTION_TOKENS, Checkpoint, model_folder
from leon_jax.decode.guidance import make_guidance
from leon_jax.decode.library import cache, check
from leon_jax.decode.results import Generation, credit
from leon_jax.decode.sampling import make_sampler
from leon_jax.leon import Leon

_TASKS = ("text_to_image", "caption")

FLAGS = flags.FlagValues()
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "model folder; the shipped model if not given", flag_values=FLAGS
)
_INDEX = flags.DEFINE_string(
    "index",
    None,
    "prepared folder to retrieve from; found or made once if not given",
    flag_values=FLAGS,
)
_TASK = flags.DEFINE_enum("task", _TASKS[0], list(_TASKS), "what to do", flag_values=FLAGS)
_PROMPT = flags.DEFINE_string("prompt", None, "what the pictures should show", flag_values=FLAGS)
_PROMPTS = flags.DEFINE_string(
    "prompts", None, "a text file with one prompt a line", flag_values=FLAGS
)
_BEST_OF = flags.DEFINE_integer(
    "best_of", None, "how many to draw for a prompt, of which the best are kept", flag_values=FLAGS
)
_RANK_BY = flags.DEFINE_enum(
    "rank_by", "clip", ["clip", "likelihood"], "what is best: the picture that the retrieval "
    "encoder finds most like the prompt, or for which the prompt is the likeliest caption",
    flag_values=FLAGS,
)  # fmt: skip
_IMAGE = flags.DEFINE_string("image", None, "the picture to caption", flag_values=FLAGS)
_GUIDANCE = flags.DEFINE_float(
    "guidance", 3.0, "classifier-free guidance weight; 1 is none", flag_values=FLAGS
)
_NUM_DOCS = flags.DEFINE_integer(
    "num_docs", 2, "how many documents to retrieve and read first", flag_values=FLAGS
)
_NUM_IMAGES = flags.DEFINE_integer("num_images", 4, "how many pictures to draw", flag_values=FLAGS)
_TOP_P = flags.DEFINE_float(
    "top_p", 1.0, "sample from the most likely tokens of this total", flag_values=FLAGS
)
_TEMPERATURE = flags.DEFINE_float(
    "temperature",
    None,
    "0 is greedy; 1 for pictures and 0 for captions if not given",
    flag_values=FLAGS,
)
_SEED = flags.DEFINE_integer(
    "seed", 0, "decides the result; picture i gets seed + i", flag_values=FLAGS
)
_WARM = flags.DEFINE_bool(
    "warm", False, "compile ahead what pictures with these settings need, for any prompt, and stop",
    flag_values=FLAGS,
)  # fmt: skip
_OUT = flags.DEFINE_string(
    "out", "out", "folder for the pictures; made if missing", flag_values=FLAGS
)


def main(argv: list[str]) -> None:
    """Runs the verb with the flags that were parsed.

    Raises:
      UserError: anything the person can fix; found before weights are read or files made.
    """
    del argv
    checkpoint = Checkpoint.open(model_folder(_CHECKPOINT.value))
    caption = _TASK.value == "caption"
    temperature = _TEMPERATURE.value
    if temperature is None:
        temperature = 0.0 if caption else 1.0
    make_sampler(temperature, _TOP_P.value)
    make_guidance(_GUIDANCE.value)
    if _SEED.value < 0:
        raise UserError(f"--seed is {_SEED.value}; it must be 0 or more")
    # What was compiled once is found again by the next process.
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache() / "compiled"))
    if _WARM.value:
        _warm(temperature)
        return
    if _INDEX.value is not None:
        check(pathlib.Path(_INDEX.value), checkpoint.folder)
    (_caption if caption else _draw)(checkpoint, temperature)


def _warm(temperature: float) -> None:
    leon = Leon.load(_CHECKPOINT.value)
    count = leon.warm(
        _BEST_OF.value or _NUM_IMAGES.value,
        _GUIDANCE.value,
        temperature=temperature,
        top_p=_TOP_P.value,
    )
    print(
        f"compiled for {count} lengths of prompts; kept in {jax.config.jax_compilation_cache_dir}"
    )


def _draw(checkpoint: Checkpoint, temperature: float) -> None:
    count = _NUM_IMAGES.value
    prompts = _prompts()
    if _IMAGE.value is not None:
        raise UserError("--image is for --task=caption; a picture is drawn from --prompt alone")
    if count < 1:
        raise UserError(f"--num_images is {count}; it must be at least 1")
    if _BEST_OF.value is not None and _BEST_OF.value < count:
        raise UserError(f"--best_of is {_BEST_OF.value}; it must be at least --num_images, {count}")
    single = _PROMPTS.value is None
    if single:
        checkpoint.check_prompt(prompts[1], _NUM_DOCS.value)
    out = pictures.check_folder(_OUT.value)
    stems = {line: slug(p) if single else f"{line:05d}-{slug(p)}" for line, p in prompts.items()}
    asked = [line for line in prompts if single or not _is_drawn(out, stems[line], count)]
    if not single and len(asked) < len(prompts):
        print(f"{len(prompts) - len(asked)} of {len(prompts)} prompts have their pictures already")
    if not asked:
        return

    leon = Leon.load(_CHECKPOINT.value, _INDEX.value)
    drawn = leon.generate_each(
        [prompts[line] for line in asked],
        num_images=count,
        num_docs=_NUM_DOCS.value,
        guidance=_GUIDANCE.value,
        temperature=temperature,
        top_p=_TOP_P.value,
        seed=_SEED.value,
        best_of=_BEST_OF.value,
        rank_by=_RANK_BY.value,  # type: ignore[arg-type]  # absl checks it
    )
    failed = {}
    with tqdm(total=len(asked), unit="prompt", disable=single) as bar:
        for place, result in drawn:
            line = asked[place]
            bar.update()
            if isinstance(result, UserError):
                failed[line] = result
                continue
            for path in _save(result, out, stems[line]):
                bar.write(str(path))
            if single:
                _print_retrieved(result[0].retrieved)
    for line, error in sorted(failed.items()):
        if single:
            raise error
        print(f"line {line}: {error}", file=sys.stderr)
    if failed:
        raise UserError(f"{len(failed)} of {len(prompts)} prompts could not be drawn (see above)")


def _prompts() -> dict[int, str]:
    """The prompts by the number of their line."""
    if (_PROMPT.value is None) == (_PROMPTS.value is None):
        given = "missing" if _PROMPT.value is None else "given beside --prompts"
        raise UserError(f'--prompt is {given}; for example --prompt="cat face, Twemoji style"')
    if _PROMPT.value is not None:
        return {1: _PROMPT.value}
    try:
        text = pathlib.Path(str(_PROMPTS.value)).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"cannot read the prompts in {_PROMPTS.value}: {reason}") from error
    lines = {n: line.strip() for n, line in enumerate(text.split("\n"), start=1) if line.strip()}
    if not lines:
        raise UserError(f"{_PROMPTS.value} holds no prompts; write one a line")
    return lines


def _is_drawn(out: pathlib.Path, stem: str, count: int) -> bool:
    """Whether all pictures of a prompt are there, by the names they would get."""
    if _BEST_OF.value is not None:  # any of the seeds
        return len(list(out.glob(f"{glob.escape(stem)}-*.png"))) >= count
    return all((out / f"{stem}-{_SEED.value + n}.png").is_file() for n in range(count))


def _save(generations: Sequence[Generation], out: pathlib.Path, stem: str) -> list[pathlib.Path]:
    """Writes the pictures of a prompt."""
    paths = [out / f"{stem}-{generation.seed}.png" for generation in generations]
    try:
        out.mkdir(parents=True, exist_ok=True)
        for generation, path in zip(generations, paths, strict=True):
            generation.save(path)
    except OSError as error:
        raise UserError(f"cannot write into {out}: {error.strerror or error}") from error
    return paths


def _caption(checkpoint: Checkpoint, temperature: float) -> None:
    if _IMAGE.value is None:
        raise UserError("--image is missing; it is the picture to caption")
    if _PROMPT.value is not None or _PROMPTS.value is not None:
        raise UserError("--prompt is for --task=text_to_image; a caption needs --image only")
    checkpoint.check_caption(CAPTION_TOKENS, _NUM_DOCS.value)
    picture = pictures.read(_IMAGE.value)

    leon = Leon.load(_CHECKPOINT.value, _INDEX.value)
    caption = leon.caption(
        picture,
        num_docs=_NUM_DOCS.value,
        max_tokens=CAPTION_TOKENS,
        temperature=temperature,
        top_p=_TOP_P.value,
        seed=_SEED.value,
    )
    print(caption.text)
    _print_retrieved(caption.retrieved)


def _print_retrieved(documents) -> None:
    if documents:
        print("retrieved:")
    for document in documents:
        said = credit(document)
        source = ", ".join(said[key] for key in ("key", "licence", "attribution") if said.get(key))
        print(f"  {said['caption']} ({source})")


def slug(prompt: str) -> str:
    """A file name that a person recognises the prompt by; never empty, at most 60 characters."""
    return re.sub(r"[^\w]+", "-", prompt).strip("-_").lower()[:60].rstrip("-_") or "picture"
