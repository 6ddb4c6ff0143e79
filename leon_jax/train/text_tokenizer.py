"""Trains the text tokenizer on the captions of the training split."""

import dataclasses
import pathlib
from typing import Literal

from leon_jax.datasets import demo
from leon_jax.documents import Text
from leon_jax.tokenizers.text import TextTokenizer


@dataclasses.dataclass(frozen=True)
class TextData:
    """The training data: a dataset folder written by `leon prepare`."""

    dir: str


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Configuration of a text tokenizer's training.

    Attributes:
      data: the captions.
      size: entries of the byte-level BPE vocabulary, 256 to 56,320. The result may be smaller if
        the captions have too few pairs to merge.
      kind: always "text".
    """

    data: TextData
    size: int
    kind: Literal["text"] = "text"


def run(config: TextConfig, workdir: pathlib.Path) -> TextTokenizer:
    """Trains on the captions of the train split and writes `workdir/export/text.json`."""
    source = demo.source("train", config.data.dir)
    captions = (
        part.text for document in source for part in document.parts if isinstance(part, Text)
    )
    tokenizer = TextTokenizer.train(captions, config.size)
    path = workdir / "export" / "text.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(path)
    return tokenizer
