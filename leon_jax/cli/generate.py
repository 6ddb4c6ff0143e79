"""Draws pictures for a prompt, or writes a caption for a picture.

    leon generate --prompt="cat face, Twemoji style" --num_images=4 --out=pictures
    leon generate --task=caption --image=cat.png

The model that comes with the package is used unless --checkpoint names another. Each picture is a
PNG that carries its prompt, seed, guidance, model and the retrieved documents' licences as text.
"""

import pathlib
import re

from absl import flags

from leon_jax.config import UserError
from leon_jax.data import pictures
from leon_jax.decode.checkpoint import CAPTION_TOKENS, Checkpoint, model_folder
from leon_jax.decode.guidance import make_guidance
from leon_jax.decode.library import check
from leon_jax.decode.results import credit
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
    if _INDEX.value is not None:
        check(pathlib.Path(_INDEX.value), checkpoint.folder)
    (_caption if caption else _draw)(checkpoint, temperature)


def _draw(checkpoint: Checkpoint, temperature: float) -> None:
    prompt, count = _PROMPT.value, _NUM_IMAGES.value
    if prompt is None:
        raise UserError('--prompt is missing; for example --prompt="cat face, Twemoji style"')
    if _IMAGE.value is not None:
        raise UserError("--image is for --task=caption; a picture is drawn from --prompt alone")
    if count < 1:
        raise UserError(f"--num_images is {count}; it must be at least 1")
    checkpoint.check_prompt(prompt, _NUM_DOCS.value)
    out = pictures.check_folder(_OUT.value)

    leon = Leon.load(_CHECKPOINT.value, _INDEX.value)
    generations = leon.generate(
        prompt,
        num_images=count,
        num_docs=_NUM_DOCS.value,
        guidance=_GUIDANCE.value,
        temperature=temperature,
        top_p=_TOP_P.value,
        seed=_SEED.value,
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
        for generation in generations:
            path = out / f"{slug(prompt)}-{generation.seed}.png"
            generation.save(path)
            print(path)
    except OSError as error:
        raise UserError(f"cannot write into {out}: {error.strerror or error}") from error
    _print_retrieved(generations[0].retrieved)


def _caption(checkpoint: Checkpoint, temperature: float) -> None:
    if _IMAGE.value is None:
        raise UserError("--image is missing; it is the picture to caption")
    if _PROMPT.value is not None:
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
