"""Generates images for a prompt, or a caption for an image.

    leon generate --prompt="cat face, Twemoji style" --num_images=4 --out=images
    leon generate --prompts=prompts.txt --num_images=1 --out=images
    leon generate --task=caption --image=cat.png

Without --model it uses the shipped model. Guidance, sampling and the number of retrieved documents
are those of the model folder, if no flag sets them. Each image is a PNG. Its metadata has the
prompt, the seed, the settings, the model and the licences of the retrieved documents.

--prompts names a file with one prompt a line. Each image is written when it is finished. A prompt
whose images are finished with the same settings is skipped, so the same command continues a job
that was stopped. OUT/generated.jsonl lists the finished images. Equal prompts are generated once.
"""

import pathlib
import sys
from typing import TYPE_CHECKING, Any

from absl import flags

from leon_jax.config import UserError

if TYPE_CHECKING:
    from leon_jax.generate.image_settings import ImageSettings
    from leon_jax.leon import Leon
    from leon_jax.model_folder import ModelFolder

_TASKS = ("text_to_image", "caption")

FLAGS = flags.FlagValues()
_MODEL = flags.DEFINE_string(
    "model", None, "model folder, or a .tar of one; the shipped model if not given",
    flag_values=FLAGS,
)  # fmt: skip
_INDEX = flags.DEFINE_string(
    "index",
    None,
    "prepared folder to retrieve from; the index that the model folder names if not given",
    flag_values=FLAGS,
)
_TASK = flags.DEFINE_enum("task", _TASKS[0], list(_TASKS), "what to generate", flag_values=FLAGS)
_PROMPT = flags.DEFINE_string("prompt", None, "what the images should show", flag_values=FLAGS)
_PROMPTS = flags.DEFINE_string(
    "prompts", None, "a text file with one prompt a line", flag_values=FLAGS
)
_BEST_OF = flags.DEFINE_integer(
    "best_of", None, "how many images to generate for a prompt; the best num_images are kept",
    flag_values=FLAGS,
)  # fmt: skip
_RANK_BY = flags.DEFINE_enum(
    "rank_by", "clip", ["clip", "likelihood"], "what is best: the image that the retrieval encoder "
    "finds most like the prompt, or for which the prompt is the likeliest caption",
    flag_values=FLAGS,
)  # fmt: skip
_IMAGE = flags.DEFINE_string("image", None, "the image to caption", flag_values=FLAGS)
_GUIDANCE = flags.DEFINE_float(
    "guidance", None, "classifier-free guidance weight; 1 is none; the model's if not given",
    flag_values=FLAGS,
)  # fmt: skip
_NUM_DOCS = flags.DEFINE_integer(
    "num_docs", None, "how many documents to retrieve and read first; the model's number if not "
    "given", flag_values=FLAGS,
)  # fmt: skip
_NUM_IMAGES = flags.DEFINE_integer(
    "num_images", 4, "how many images of each prompt", flag_values=FLAGS
)
_TOP_P = flags.DEFINE_float(
    "top_p", None, "sample from the most likely tokens of this total probability; the model's for "
    "images, 1 for captions, if not given", flag_values=FLAGS,
)  # fmt: skip
_TOP_K = flags.DEFINE_integer(
    "top_k", None, "sample from this many of the most likely tokens; 0: from all; the model's for "
    "images, 0 for captions, if not given", flag_values=FLAGS,
)  # fmt: skip
_TEMPERATURE = flags.DEFINE_float(
    "temperature",
    None,
    "0 is greedy; the model's for images and 0 for captions if not given",
    flag_values=FLAGS,
)
_SEED = flags.DEFINE_integer(
    "seed", 0, "of the random numbers; image i has seed + i", flag_values=FLAGS
)
# Equal to `WeightType` and `CacheDtype`, whose modules would make --help slow.
_WEIGHTS = flags.DEFINE_enum(
    "weights", "float32", ["float32", "bfloat16", "int8"], "dtype of the decoder's weights",
    flag_values=FLAGS,
)  # fmt: skip
_CACHE = flags.DEFINE_enum(
    "cache", "compute", ["compute", "int8"], "dtype of cached keys and values; compute: that of "
    "the decoder's activations", flag_values=FLAGS,
)  # fmt: skip
_WARM = flags.DEFINE_bool(
    "warm", False, "compile what images with these settings need, for any prompt (with --prompts: "
    "for a file of them), and stop", flag_values=FLAGS,
)  # fmt: skip
_OUT = flags.DEFINE_string(
    "out", "out", "folder for the images; made if missing", flag_values=FLAGS
)


def main(argv: list[str]) -> None:
    """Runs `leon generate`.

    Raises:
      UserError: a mistake of the user; it is raised before weights are read or files are written.
    """
    del argv
    from leon_jax.compilation_cache import compiled_folder, use_compilation_cache
    from leon_jax.generate.retriever import find_index
    from leon_jax.model_folder import ModelFolder

    folder = ModelFolder.open(_MODEL.value)
    is_caption = _TASK.value == "caption"
    settings = _settings(folder, is_caption)
    # Programs that were compiled once are found again by the next process.
    use_compilation_cache(compiled_folder())
    if _WARM.value:
        if is_caption:
            raise UserError("--warm is for images; captions compile little")
        _warm(folder, settings)
        return
    if _INDEX.value is not None or (settings.max_docs and not folder.index.prepare):
        find_index(folder, _INDEX.value)
    if is_caption:
        _caption(folder, settings)
    else:
        _generate(folder, settings)


def _settings(folder: "ModelFolder", is_caption: bool) -> "ImageSettings":
    """The settings of the flags, and of the model; those of a caption have one sample.

    Raises:
      UserError: a flag is out of range.
    """
    from leon_jax.engine.sampling_params import MAX_TOKENS, SamplingParams
    from leon_jax.generate import context_limits, retriever
    from leon_jax.generate.image_settings import ImageSettings

    num_docs, sampling = _NUM_DOCS.value, folder.defaults.sampling
    if num_docs is None:
        num_docs = retriever.usable_defaults(folder, _INDEX.value).num_docs
        if is_caption:
            num_docs = min(num_docs, context_limits.fitting_docs(folder, MAX_TOKENS))
    num_images, best_of = (1, None) if is_caption else (_NUM_IMAGES.value, _BEST_OF.value)
    if is_caption:
        sampling = SamplingParams.of(temperature=0.0)
    rank_by: Any = _RANK_BY.value
    try:
        params = sampling.replace(
            guidance=_GUIDANCE.value,
            temperature=_TEMPERATURE.value,
            top_p=_TOP_P.value,
            top_k=_TOP_K.value,
        )
        return ImageSettings((params,), num_images, num_docs, _SEED.value, best_of, rank_by)
    except UserError as error:  # it begins with the argument, which is the flag
        raise UserError(f"--{error}") from error


def _load(folder: "ModelFolder") -> "Leon":
    from leon_jax.leon import Leon

    dtypes: Any = _WEIGHTS.value, _CACHE.value
    return Leon.load(folder, _INDEX.value, *dtypes)


def _warm(folder: "ModelFolder", settings: "ImageSettings") -> None:
    import jax

    from leon_jax.generate import context_limits

    num_prompts = 1 if _PROMPTS.value is None else len(_prompts())
    context_limits.check_num_docs(folder, settings.max_docs)
    print("compiling, which takes a minute or so for a small model ...", file=sys.stderr)
    lengths = _load(folder).warm(settings, num_prompts)
    print(
        f"compiled for {lengths} lengths of prompts; kept in {jax.config.jax_compilation_cache_dir}"
    )


def _generate(folder: "ModelFolder", settings: "ImageSettings") -> None:
    """Generates images for --prompt or --prompts."""
    from tqdm import tqdm

    from leon_jax.data import image_files
    from leon_jax.generate import context_limits
    from leon_jax.generate.image_metadata import ModelState
    from leon_jax.generate.journal import FinishedImages, Journal

    prompts = _prompts()
    if _IMAGE.value is not None:
        raise UserError("--image is for --task=caption; images are generated from --prompt alone")
    context_limits.check_num_docs(folder, settings.max_docs)
    is_single = _PROMPTS.value is None
    if is_single:
        context_limits.check_prompt(folder, prompts[1], settings.max_docs)
    journal = Journal(image_files.check_folder(_OUT.value))
    lines = list(prompts)
    if not is_single:
        state = ModelState(folder.name, folder.digest, _WEIGHTS.value, _CACHE.value)
        finished = FinishedImages(journal, settings, state, folder.former_digests)
        lines = [line for line in prompts if prompts[line] not in finished]
        if skipped := len(prompts) - len(lines):
            print(f"{skipped} of {len(prompts)} prompts have their images already")
    if not lines:
        return

    results = _load(folder).generate_each([prompts[line] for line in lines], settings)
    failed = 0
    with tqdm(total=len(lines), unit="prompt", disable=is_single) as bar:
        for index, result in results:
            bar.update()
            if isinstance(result, UserError):
                if is_single:
                    raise result
                failed += 1
                bar.write(f"line {lines[index]}: {result}", file=sys.stderr)
                continue
            try:
                paths = journal.add(result)
            except OSError as error:
                raise UserError(
                    f"cannot write into {_OUT.value}: {error.strerror or error}"
                ) from error
            for path in paths:
                bar.write(str(path))
            if is_single:
                _print_retrieved(result[0].retrieved)
    if failed:
        raise UserError(f"{failed} of {len(prompts)} prompts have no images (see above)")


def _prompts() -> dict[int, str]:
    """The distinct prompts by the number of the first line that holds them."""
    from leon_jax.documents import normalise_text

    if (_PROMPT.value is None) == (_PROMPTS.value is None):
        if _PROMPT.value is not None:
            raise UserError("--prompt is given beside --prompts; give one of them")
        raise UserError('--prompt is missing; for example --prompt="cat face, Twemoji style"')
    if _PROMPT.value is not None:
        return {1: normalise_text(_PROMPT.value)}
    try:
        text = pathlib.Path(str(_PROMPTS.value)).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"cannot read the prompts in {_PROMPTS.value}: {reason}") from error
    lines: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if prompt := normalise_text(line):
            lines.setdefault(prompt, number)
    if not lines:
        raise UserError(f"{_PROMPTS.value} holds no prompts; write one a line")
    return {number: prompt for prompt, number in lines.items()}


def _caption(folder: "ModelFolder", settings: "ImageSettings") -> None:
    """Generates a caption for --image."""
    from leon_jax.data import image_files
    from leon_jax.engine.sampling_params import MAX_TOKENS
    from leon_jax.generate import context_limits

    if _IMAGE.value is None:
        raise UserError("--image is missing; it is the image to caption")
    if _PROMPT.value is not None or _PROMPTS.value is not None:
        raise UserError("--prompt is for --task=text_to_image; a caption needs --image only")
    context_limits.check_caption(folder, MAX_TOKENS, settings.max_docs)
    image = image_files.read(_IMAGE.value)
    caption = _load(folder).caption(
        image,
        num_docs=settings.max_docs,
        temperature=_TEMPERATURE.value or 0.0,
        top_p=_TOP_P.value,
        top_k=_TOP_K.value,
        seed=settings.seed,
    )
    print(caption.text)
    _print_retrieved(caption.retrieved)


def _print_retrieved(documents) -> None:
    from leon_jax.generate.image_metadata import credit

    if documents:
        print("retrieved:")
    for document in documents:
        known = credit(document)
        notes = [known[key] for key in ("key", "licence", "attribution") if known.get(key)]
        print(f"  {known['caption']} ({', '.join(notes)})")
