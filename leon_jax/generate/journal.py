"""Names image files, and records the images of a folder in a journal.

The journal is a file of JSON lines, `["file name", "key"]`. Lines are only appended. The key is a
hash of everything that an image depends on, so a job with many prompts finds the finished images
without opening them. An image in the folder that is not in the journal is opened once.
"""

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import PIL.Image

from leon_jax.documents import normalise_text
from leon_jax.generate.image_metadata import ModelState, former_settings_text, settings_text
from leon_jax.generate.image_settings import ImageSettings
from leon_jax.generate.results import GeneratedImage

JOURNAL = "generated.jsonl"


def file_name(prompt: str, seed: int) -> str:
    """Returns the file name of an image. Different prompts have different names.

    The name has the words of the prompt (at most 60 characters and 120 bytes, because file systems
    allow 255 bytes), 12 hexadecimal digits of the prompt's SHA-256, and the seed.
    """
    words = re.sub(r"[^\w]+", "-", prompt).strip("-_").lower()[:60]
    stem = words.encode()[:120].decode(errors="ignore").rstrip("-_") or "image"
    return f"{stem}-{hashlib.sha256(prompt.encode()).hexdigest()[:12]}-{seed}.png"


def image_key(prompt: str, seed: str, model: str, settings: str) -> str:
    """Returns 20 hexadecimal digits of a hash of the prompt, seed, model and settings."""
    return hashlib.sha256(f"{prompt}\0{seed}\0{_digest(model, settings)}".encode()).hexdigest()[:20]


@functools.lru_cache
def _digest(model: str, settings: str) -> str:
    """Returns a digest of values that all images of a job share; cached, because they are long."""
    return hashlib.sha256(f"{model}\0{settings}".encode()).hexdigest()


class Journal:
    """The images of a folder.

    Args:
      folder: the folder; a missing folder has no images.

    Attributes:
      folder: the folder.
      keys: `image_key` of every image in the folder; "" for images of other programs.

    Raises:
      OSError: images are missing in the journal, and it cannot be written.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder, self._path = folder, folder / JOURNAL
        try:
            images = {entry.name for entry in os.scandir(folder) if entry.name.endswith(".png")}
        except OSError:
            images = set()
        keys: dict[str, str] = dict(self._entries())
        scanned = {name: _key_of(folder / name) for name in sorted(images - keys.keys())}
        if scanned:
            self._append(scanned)
        self.keys = {key for name, key in (keys | scanned).items() if name in images}

    def add(self, images: Sequence[GeneratedImage]) -> list[pathlib.Path]:
        """Writes each image atomically, then appends their lines to the journal.

        Returns:
          The paths of the files.

        Raises:
          OSError: a file cannot be written.
        """
        entries = {}
        for image in images:
            name = file_name(image.prompt, image.seed)
            image.save(self.folder / name)
            entries[name] = image_key(image.prompt, str(image.seed), image.model, image.settings)
        self._append(entries)
        self.keys.update(entries.values())
        return [self.folder / name for name in entries]

    def _entries(self) -> Iterator[Any]:
        """Yields file names and keys. It skips lines that were cut off when a process died."""
        try:
            text = self._path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return
        try:
            # Parsing all lines at once takes a quarter of the time of parsing each line.
            yield from json.loads(f"[{','.join(text.splitlines())}]")
            return
        except ValueError:
            pass
        for line in text.splitlines():
            with contextlib.suppress(ValueError):
                name, key = json.loads(line)
                yield name, key

    def _append(self, entries: dict[str, str]) -> None:
        lines = "".join(f"{json.dumps([name, key])}\n" for name, key in entries.items())
        with self._path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # the last line was cut off
                    lines = "\n" + lines
            file.write(lines.encode())


class FinishedImages:
    """The prompts that have all their images in a folder; use it with `in`.

    Args:
      journal: the journal of the folder.
      settings: the settings of the images, filled (see `ImageSettings.filled`).
      model: the model of the images.
      former_digests: digests of the same decoder in earlier versions of this project.
    """

    def __init__(
        self,
        journal: Journal,
        settings: ImageSettings,
        model: ModelState,
        former_digests: Sequence[str] = (),
    ):
        self._keys, self._model, self._num_images = journal.keys, model.name, settings.num_images
        rest = settings.max_docs, settings.best_of, settings.rank_by
        former = [
            ModelState(model.name, digest, model.weights, model.cache) for digest in former_digests
        ]
        # For each sample: its seed, and the settings texts of images that count as finished.
        self._samples = [
            (
                str(sample.seed),
                [
                    settings_text(sample.params, model, *rest),
                    *(former_settings_text(sample.params, state, *rest) for state in former),
                ],
            )
            for sample in settings.samples
        ]

    def __contains__(self, prompt: str) -> bool:
        """Returns whether at least `num_images` images of a prompt exist."""
        finished = 0
        for seed, settings in self._samples:
            keys = (image_key(prompt, seed, self._model, text) for text in settings)
            finished += any(key in self._keys for key in keys)
        return finished >= self._num_images


def _key_of(path: pathlib.Path) -> str:
    """Returns the key of an image from its metadata; "" if it is damaged or lacks metadata."""
    try:
        with PIL.Image.open(path) as image:
            text: dict[str, str] = getattr(image, "text", {})
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError):
        return ""
    if not {"prompt", "seed", "model", "settings"} <= set(text):
        return ""
    return image_key(normalise_text(text["prompt"]), text["seed"], text["model"], text["settings"])
