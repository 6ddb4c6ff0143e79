"""Training the text tokenizer on the captions of the training split."""

import dataclasses
import pathlib
from typing import Literal

from leon_jax.datasets import demo
from leon_jax.documents import Text
from leon_jax.tokenizers.text import TextTokenizer


@dataclasses.dataclass(frozen=True)
class TextData:
    """Where captions come from: the dataset folder made by `leon prepare`."""

    dir: str


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """A run that trains a text tokenizer.

    Attributes:
      size: entries of the byte-level BPE vocabulary, 256 to 56,320; fewer result when the captions
        hold no more pairs to merge.
    """

    data: TextData
    size: int
    kind: Literal["text"] = "text"


def run(config: TextConfig, workdir: pathlib.Path) -> TextTokenizer:
    """Trains on the captions of `train` and writes `workdir/export/text.json`."""
    source = demo.source("train", config.data.dir)
    captions = (
        part.text for document in source for part in document.parts if isinstance(part, Text)
    )
    tokenizer = TextTokenizer.train(captions, config.size)
    path = workdir / "export" / "text.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(path)
    return tokenizer
