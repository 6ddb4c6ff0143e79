"""Writes the model card, `README.md` of a model folder, from the folder and its description."""

from collections.abc import Iterable, Mapping

from leon_jax.model_description import ModelDescription, TrainingData
from leon_jax.model_folder import CONVERSION, ENCODERS, FILES, INDEX, SELECTION, ModelFolder
from leon_jax.tokenizers.template import TemplateTokenizer

_PARTS = {
    "decoder": "decoder",
    "tokenizer": "image tokenizer",
    "encoder": "retrieval encoder",
    "text": "text tokenizer",
}
# Keys of a training configuration that the card shows; `model.json` has all of them.
_SHOWN = ("batch_size", "seed", "optimizer.learning_rate", "data.length", "data.retrieved")
# Credit lines that the card shows; `model.json` has all of them.
_MAX_CREDITS = 50


def card(folder: ModelFolder, description: ModelDescription) -> str:
    """Returns the card as Markdown.

    Args:
      folder: the model folder.
      description: its description.
    """
    sections = [
        f"# {description.title}",
        _summary(folder),
        _files(folder),
        "## Use",
        *_use(folder, description),
        "## Data",
        *_data(description),
        "## Licences",
        *_licences(folder, description),
        "## Training",
        *_training(description),
    ]
    if description.notes:
        sections.append(description.notes.strip())
    return "\n\n".join(filter(None, sections)) + "\n"


def _summary(folder: ModelFolder) -> str:
    rows, columns = folder.tokenizer.image_shape
    parts = (
        "one decoder that turns text into images and images into text, with the tokenizers and the "
        "retrieval encoder that belong to it"
    )
    if isinstance(folder.tokenizer, TemplateTokenizer):
        parts = (
            f"a decoder of {folder.tokenizer.template.family}, which draws an image for a prompt, "
            "and its image tokenizer, converted from their published weights"
        )
    return (
        "A model of leon_jax, an open reimplementation of CM3Leon (arXiv:2309.02591): "
        f"{parts}. The decoder has {folder.config.parameter_count():,} "
        f"parameters and a context of {folder.context:,} tokens. An image has {rows} x {columns} "
        f"codes out of {folder.tokenizer.vocabulary.image_codes:,}. The text tokenizer has "
        f"{folder.tokenizer.text.size:,} entries."
    )


def _files(folder: ModelFolder) -> str:
    contents = {
        "decoder.safetensors": "the decoder",
        "tokenizer.safetensors": "the image tokenizer",
        "text.json": "the text tokenizer",
        "encoder.safetensors": "the retrieval encoder",
        "encoder": "the retrieval encoder, a CLIP with its own text tokenizer",
        SELECTION: "the selection rules of the encoder",
        INDEX: "the documents that the model retrieves",
        CONVERSION: "where the weights come from, with the digest of each tensor",
    }
    names = (*FILES, *ENCODERS, SELECTION, INDEX, CONVERSION)
    present = [(name, contents[name]) for name in names if (folder.path / name).exists()]
    present.append(("model.json", "generation defaults, data, licences and training"))
    return _table(("file", "content"), ((f"`{name}`", content) for name, content in present))


def _use(folder: ModelFolder, description: ModelDescription) -> list[str]:
    prompt = (description.prompt or "a red heart").replace("\\", "\\\\").replace('"', '\\"')
    prompt = prompt.replace("$", "\\$").replace("`", "\\`")
    defaults = description.defaults()
    max_docs = description.generation.get("max_docs", folder.max_docs)
    guidance = getattr(defaults.sampling.guidance, "weight", None)
    documents = "1 document" if defaults.num_docs == 1 else f"{defaults.num_docs} documents"
    sentence = (
        f"Without flags it reads at most {documents} before each image (the context holds "
        f"{max_docs}), with {'no guidance' if guidance is None else f'guidance {guidance:g}'}. "
    )
    if isinstance(folder.tokenizer, TemplateTokenizer):
        sentence = "" if guidance is None else f"Without flags it draws with guidance {guidance:g}."
    elif description.index.prepare:
        sentence += "Its index has the emoji documents, which are prepared at the first use."
    elif description.index.folder:
        sentence += f"The documents are in `{description.index.folder}`."
    else:
        sentence += (
            "It has no index of its own, and generates without documents unless `--index` names "
            "a prepared folder that was made with the files of this folder."
        )
    return [
        "In this folder, with leon_jax installed:",
        f'```bash\nleon generate --model=. --prompt="{prompt}" --num_images=4 --out=images\n```',
        sentence,
    ]


def _data(description: ModelDescription) -> list[str]:
    if not description.data:
        return ["The data are not recorded."]
    header = ("dataset", "split", "documents", "licences", "used for")
    rows = (
        (
            each.name,
            each.split,
            f"{each.documents:,}" if each.documents else "not recorded",
            _counts(each.licences) or "not recorded",
            ", ".join(_PARTS.get(part, part) for part in each.parts),
        )
        for each in description.data
    )
    sections = [_table(header, rows)]
    if sources := [line for each in description.data if (line := _sources(each))]:
        sections.append("\n".join(sources))
    return sections


def _sources(data: TrainingData) -> str:
    return f"- {data.name}: {_counts(data.sources)}" if data.sources else ""


def _licences(folder: ModelFolder, description: ModelDescription) -> list[str]:
    sections, licences = [], ", ".join(description.licences)
    if licences and isinstance(folder.tokenizer, TemplateTokenizer):
        sections.append(f"The weights were published under: {licences}.")
    elif licences:
        sections.append(
            f"From its data the model has these licences: {licences}. A model that is fine-tuned "
            "from this one inherits them."
        )
    if description.unknown_licences:
        names = ", ".join(_PARTS.get(part, part) for part in description.unknown_licences)
        sections.append(f"The licences of the data of these parts are not recorded: {names}.")
    credits = dict.fromkeys(credit for each in description.data for credit in each.credits)
    if credits:
        shown = [f"- {' '.join(credit.split())}" for credit in list(credits)[:_MAX_CREDITS]]
        if more := len(credits) - len(shown):
            shown.append(f"- {more:,} more in `model.json`")
        sections.append("Credits:\n\n" + "\n".join(shown))
    return sections


def _training(description: ModelDescription) -> list[str]:
    lines = []
    for part, known in description.training.items():
        if not known:
            continue
        facts = [f"{known['steps']:,} steps"] if isinstance(known.get("steps"), int) else []
        if known.get("base"):
            facts.append(f"from `{known['base']}`")
        if known.get("file"):
            facts.append(f"config `{known['file']}`")
        for key in _SHOWN:
            value = _lookup(known.get("config") or {}, key)
            if value is not None:
                facts.append(f"`{key}` {value}")
        lines.append(f"- {_PARTS.get(part, part)}: {', '.join(facts) or 'see `model.json`'}")
    if not lines:
        return ["The training is not recorded."]
    versions = ", ".join(f"{name} {version}" for name, version in description.versions.items())
    return ["\n".join(lines), f"Written with {versions}." if versions else ""]


def _counts(counts: Mapping[str, int]) -> str:
    largest = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{name} ({count:,})" if count else name for name, count in largest)


def _lookup(config: Mapping, key: str) -> object:
    value: object = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    cells = ([cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
