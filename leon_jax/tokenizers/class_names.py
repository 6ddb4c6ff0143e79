"""The text tokenizer of a class-conditional model: a class is one token.

It takes the place of the byte-level BPE (`leon_jax.tokenizers.text`) in a model folder, also in the
file text.json. A text is the number of a class or one of its names.
"""

import difflib
import json
import os
from collections.abc import Sequence
from typing import Any, Self

from leon_jax import storage
from leon_jax.config import UserError
from leon_jax.tokenizers.text import TextTokenizer

# The value of the key `kind` in text.json.
KIND = "class_names"
_MAX_SUGGESTIONS = 4


class ClassNames:
    """Converts the number or a name of a class to its token, and back.

    Case, repeated spaces and underscores in names do not matter. The first name of a class comes
    before other names of other classes: "missile" is the class that is called so first.

    Args:
      names: names of each class, in the order of the classes, separated by commas: "tench, Tinca
        tinca". An empty text: the class has a number only.

    Raises:
      UserError: there are no classes.
    """

    def __init__(self, names: Sequence[str]):
        if not names:
            raise UserError("there are no class names; a class-conditional model has at least one")
        self.names = tuple(names)
        self._classes: dict[str, list[int]] = {}
        first: dict[str, list[int]] = {}
        for number, text in enumerate(self.names):
            each = [_normal(name) for name in text.split(",") if name.strip()]
            # All names together are a name, too, so that a decoded text can be encoded.
            for name in dict.fromkeys([*each, _normal(text)] if each else []):
                self._classes.setdefault(name, []).append(number)
            for name in dict.fromkeys([*each[:1], _normal(text)] if each else []):
                first.setdefault(name, []).append(number)
        self._classes |= first

    @classmethod
    def load(cls, path: str | os.PathLike) -> Self:
        """Reads a file that `save` wrote.

        Raises:
          UserError: the file is missing or damaged, or has no class names.
        """
        values = _read(path)
        names = values.get("names") if isinstance(values, dict) else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{path} has no class names")
        return cls(names)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the names as JSON."""
        values = {"kind": KIND, "names": self.names}
        storage.write(storage.path(path), json.dumps(values, indent=1, ensure_ascii=False) + "\n")

    @property
    def size(self) -> int:
        """Number of classes."""
        return len(self.names)

    def encode(self, text: str) -> list[int]:
        """Returns the class of a number or a name, as a list of one number in 0..size-1.

        Raises:
          UserError: there is no such class, or several classes have the name.
        """
        name = _normal(text)
        if name.isdecimal():
            if int(name) >= self.size:
                raise UserError(
                    f"there is no class {name}; the model has the classes 0 to {self.size - 1}"
                )
            return [int(name)]
        classes = self._classes.get(name, [])
        if len(classes) > 1:
            listed = " or ".join(f"{number} ({self.names[number]})" for number in classes)
            raise UserError(f"several classes are called {text!r}; give a number, {listed}")
        if not classes:
            raise UserError(f"no class is called {text!r}; {self._suggestion(name)}")
        return classes

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the names of one class, or its number if it has none. No ids give no text.

        Raises:
          UserError: there are several ids, or the id is not in 0..size-1.
        """
        numbers = [int(number) for number in ids]
        if not numbers:
            return ""
        if len(numbers) > 1 or not 0 <= numbers[0] < self.size:
            raise UserError(f"{numbers} is not one class in 0..{self.size - 1}")
        return self.names[numbers[0]] or str(numbers[0])

    def _suggestion(self, name: str) -> str:
        """Returns the names that are most like an unknown name, for its error message."""
        words = set(name.split())
        alike = [known for known in self._classes if words & set(known.split())]
        alike = difflib.get_close_matches(name, alike, _MAX_SUGGESTIONS, 0) or (
            difflib.get_close_matches(name, self._classes, _MAX_SUGGESTIONS)
        )
        if not alike:
            return f"give the name of a class, or a number from 0 to {self.size - 1}"
        numbers = (f"{each} ({', '.join(map(str, self._classes[each]))})" for each in alike)
        return f"the closest are {', '.join(numbers)}"


def load_text(path: str | os.PathLike) -> TextTokenizer | ClassNames:
    """Reads a text.json of either kind.

    Raises:
      UserError: the file is missing or damaged.
    """
    values = _read(path)
    is_names = isinstance(values, dict) and values.get("kind") == KIND
    return ClassNames.load(path) if is_names else TextTokenizer.load(path)


def _read(path: str | os.PathLike) -> Any:
    try:
        return json.loads(storage.path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise UserError(f"cannot read the text tokenizer {path}: {reason}") from error
    except ValueError as error:
        raise UserError(f"{path} is not a tokenizer file") from error


def _normal(text: str) -> str:
    """Returns a name in small letters, with one space between words."""
    return " ".join(text.replace("_", " ").casefold().split())
