"""Draws pictures for a prompt, or writes a caption for a picture.

    leon generate --prompt="cat face, Twemoji style" --num_images=4 --out=pictures
    leon generate --prompts=prompts.txt --num_images=1 --out=pictures
    leon generate --task=caption --image=cat.png

The model that comes with the package is used unless --checkpoint names another. Each picture is a
PNG that carries its prompt, seed, guidance, model and the retrieved documents' licences as text.

A file of prompts has one a line. Their pictures are written as they are done, and a prompt whose
pictures are there, drawn in the same way, is passed over, so the same command goes on after it was
stopped. A prompt that stands there twice is drawn once.
"""

import glob
import os
import pathlib
import re
import sys
import zlib
from collections.abc import Sequence
from typing import get_args

import jax
import PIL.Image
from absl import flags
from tqdm import tqdm

from leon_jax.config import UserError
from leon_jax.data import pictures
from leon_jax.decode.cache import CacheType
from leon_jax.decode.checkpoint import CAPTION_TOKENS, Checkpoint, model_folder
from leon_jax.decode.completer import check_seeds, make_strategy
from leon_jax.decode.library import cache, check
from leon_jax.decode.results import Generation, credit, settings
from leon_jax.leon import Leon
from leon_jax.models.inference_weights import WeightType

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
_TOP_K = flags.DEFINE_integer(
    "top_k", 0, "sample from so many of the most likely tokens; 0: from all", flag_values=FLAGS
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
_WEIGHTS = flags.DEFINE_enum(
    "weights", "float32", list(get_args(WeightType)), "what the decoder's weights are kept in",
    flag_values=FLAGS,
)  # fmt: skip
_CACHE = flags.DEFINE_enum(
    "cache", "compute", list(get_args(CacheType)), "what keys and values are kept in",
    flag_values=FLAGS,
)  # fmt: skip
_WARM = flags.DEFINE_bool(
    "warm", False, "compile ahead what pictures with these settings need, for any prompt (for a "
    "file of them, with --prompts), and stop", flag_values=FLAGS,
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
    make_strategy(_GUIDANCE.value, temperature, _TOP_P.value, _TOP_K.value)
    count = 1 if caption else _NUM_IMAGES.value
    if count < 1:
        raise UserError(f"--num_images is {count}; it must be at least 1")
    if _BEST_OF.value is not None and not caption:
        if _BEST_OF.value < count:
            raise UserError(
                f"--best_of is {_BEST_OF.value}; it must be at least --num_images, {count}"
            )
        count = _BEST_OF.value
    try:
        check_seeds(_SEED.value, count)
    except UserError as error:
        raise UserError(f"--{error}") from error
    # What was compiled once is found again by the next process.
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache() / "compiled"))
    if _WARM.value:
        if caption:
            raise UserError("--warm is for pictures; captions compile little")
        _warm(count, temperature)
        return
    if _INDEX.value is not None:
        check(pathlib.Path(_INDEX.value), checkpoint.folder)
    (_caption if caption else _draw)(checkpoint, temperature)


def _load() -> Leon:
    return Leon.load(_CHECKPOINT.value, _INDEX.value, _WEIGHTS.value, _CACHE.value)  # type: ignore[arg-type]  # absl checks them


def _warm(count: int, temperature: float) -> None:
    prompts = 1 if _PROMPTS.value is None else len(_prompts())
    print("compiling, which takes a minute or so for a small model ...", file=sys.stderr)
    lengths = _load().warm(
        count,
        _NUM_DOCS.value,
        _GUIDANCE.value,
        temperature,
        _TOP_P.value,
        _TOP_K.value,
        prompts,
    )
    print(
        f"compiled for {lengths} lengths of prompts; kept in {jax.config.jax_compilation_cache_dir}"
    )


def _draw(checkpoint: Checkpoint, temperature: float) -> None:
    count = _NUM_IMAGES.value
    prompts = _prompts()
    if _IMAGE.value is not None:
        raise UserError("--image is for --task=caption; a picture is drawn from --prompt alone")
    checkpoint.check_num_docs(_NUM_DOCS.value)
    single = _PROMPTS.value is None
    if single:
        checkpoint.check_prompt(prompts[1], _NUM_DOCS.value)
    out = pictures.check_folder(_OUT.value)
    asked = list(prompts)
    if not single:
        strategy = make_strategy(_GUIDANCE.value, temperature, _TOP_P.value, _TOP_K.value)
        way = settings(
            strategy, _NUM_DOCS.value, checkpoint.digest, (_WEIGHTS.value, _CACHE.value),
            _BEST_OF.value, _RANK_BY.value,
        )  # fmt: skip
        said = {"model": checkpoint.name, "settings": way}
        asked = [line for line in prompts if not _is_drawn(out, prompts[line], said)]
        if len(asked) < len(prompts):
            there = len(prompts) - len(asked)
            print(f"{there} of {len(prompts)} prompts have their pictures already")
    if not asked:
        return

    drawn = _load().generate_each(
        [prompts[line] for line in asked],
        num_images=count,
        num_docs=_NUM_DOCS.value,
        guidance=_GUIDANCE.value,
        temperature=temperature,
        top_p=_TOP_P.value,
        top_k=_TOP_K.value,
        seed=_SEED.value,
        best_of=_BEST_OF.value,
        rank_by=_RANK_BY.value,  # type: ignore[arg-type]  # absl checks it
    )
    failed = 0
    with tqdm(total=len(asked), unit="prompt", disable=single) as bar:
        for place, result in drawn:
            line = asked[place]
            bar.update()
            if isinstance(result, UserError):
                if single:
                    raise result
                failed += 1
                bar.write(f"line {line}: {result}", file=sys.stderr)
                continue
            stem = slug(prompts[line]) if single else _stem(prompts[line])
            for path in _save(result, out, stem):
                bar.write(str(path))
            if single:
                _print_retrieved(result[0].retrieved)
    if failed:
        raise UserError(f"{failed} of {len(prompts)} prompts could not be drawn (see above)")


def _prompts() -> dict[int, str]:
    """The prompts by the number of the first line that they stand in."""
    if (_PROMPT.value is None) == (_PROMPTS.value is None):
        if _PROMPT.value is not None:
            raise UserError("--prompt is given beside --prompts; give one of them")
        raise UserError('--prompt is missing; for example --prompt="cat face, Twemoji style"')
    if _PROMPT.value is not None:
        return {1: _PROMPT.value}
    try:
        text = pathlib.Path(str(_PROMPTS.value)).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"cannot read the prompts in {_PROMPTS.value}: {reason}") from error
    first: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            first.setdefault(line.strip(), number)
    if not first:
        raise UserError(f"{_PROMPTS.value} holds no prompts; write one a line")
    return {number: prompt for prompt, number in first.items()}


def _stem(prompt: str) -> str:
    """What the files of a prompt of many begin with: its own, wherever in the file it stands."""
    return f"{slug(prompt)}-{zlib.crc32(prompt.encode()):08x}"


def _is_drawn(out: pathlib.Path, prompt: str, wanted: dict[str, str]) -> bool:
    """Whether all pictures of a prompt are there, and say what they would say now."""
    count = _NUM_IMAGES.value
    seeds = range(_SEED.value, _SEED.value + (_BEST_OF.value or count))
    found = 0
    for path in out.glob(f"{glob.escape(_stem(prompt))}-*.png"):
        try:
            with PIL.Image.open(path) as picture:
                said: dict[str, str] = getattr(picture, "text", {})
        except (OSError, ValueError):  # damaged, or not ours
            continue
        same = all(said.get(key) == text for key, text in (wanted | {"prompt": prompt}).items())
        found += same and said.get("seed", "") in [str(seed) for seed in seeds]
    return found >= count


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

    caption = _load().caption(
        picture,
        num_docs=_NUM_DOCS.value,
        max_tokens=CAPTION_TOKENS,
        temperature=temperature,
        top_p=_TOP_P.value,
        top_k=_TOP_K.value,
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
    """A file name that a person recognises the prompt by; never empty.

    At most 60 characters and 120 bytes, for a file system takes 255 bytes with what is added.
    """
    words = re.sub(r"[^\w]+", "-", prompt).strip("-_").lower()[:60]
    return words.encode()[:120].decode(errors="ignore").rstrip("-_") or "picture"
