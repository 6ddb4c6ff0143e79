"""Trains the text tokenizer on the texts of documents folders."""

import dataclasses
import itertools
import pathlib
from typing import Literal

from leon_jax import storage
from leon_jax.config import UserError
from leon_jax.data.config import FoldersConfig
from leon_jax.tokenizers.text import SMALLEST, TextTokenizer
from leon_jax.train import document_data


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Configuration of a text tokenizer's training.

    Attributes:
      data: the documents folders whose texts are used. With a mixture, pairs are counted in
        proportion to the weights.
      size: entries of the byte-level BPE vocabulary, 256 to 56,320. The result is smaller if the
        texts have too few pairs to merge.
      texts: further texts, for example instructions of tasks that the model will be tuned on.
      split_digits: whether every digit is a token of its own.
      kind: always "text".
    """

    data: FoldersConfig
    size: int
    texts: tuple[str, ...] = ()
    split_digits: bool = False
    kind: Literal["text"] = "text"


def run(config: TextConfig, workdir: pathlib.Path) -> TextTokenizer:
    """Trains on all texts of the training data and writes `workdir/export/text.json`.

    The same data always gives the same file.

    Raises:
      UserError: a folder is missing or damaged, the documents have no text, `size` is out of
        range, or the file cannot be written.
    """
    components = document_data.open_components(config.data)
    texts = itertools.chain(document_data.weighted_texts(components), config.texts)
    tokenizer = TextTokenizer.train(texts, config.size, split_digits=config.split_digits)
    if tokenizer.size == SMALLEST < config.size:
        folders = ", ".join(component.name for component in components)
        raise UserError(
            f"the documents of {folders} have no word of two bytes, so no vocabulary can be "
            "learnt; name a documents folder with texts in config.data.folder"
        )
    path = workdir / "export" / "text.json"
    try:
        storage.make_folder(path.parent)
    except OSError as error:
        raise UserError(f"cannot write to {path.parent}: {error.strerror}") from error
    tokenizer.save(path)
    return tokenizer


def summary(tokenizer: TextTokenizer, config: TextConfig) -> str:
    """Returns the number of entries in words, and the reason if it is smaller than asked for."""
    if tokenizer.size == config.size:
        return f"{tokenizer.size} entries"
    return (
        f"{tokenizer.size} entries instead of {config.size} (config.size), since the texts have no "
        "more pairs to merge"
    )
