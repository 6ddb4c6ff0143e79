"""What the emoji are called: names in 14 languages, from the package `emoji`, and captions."""

import functools

from leon_jax.datasets.emoji.designs import OPENMOJI, TWEMOJI, Design, files, import_package
from leon_jax.documents import normalise_text

# Besides English.
LANGUAGES = ("es", "ja", "ko", "pt", "it", "fr", "de", "fa", "id", "zh", "ru", "tr", "ar")
_PUNCTUATION = str.maketrans(
    dict.fromkeys("\u2018\u2019", "'") | dict.fromkeys("\u201c\u201d«»", '"')
)


def caption(design: Design, concept: str, language: str) -> str:
    """The caption of a picture: the name and the style, for example "cat face, OpenMoji style".

    Raises:
      UserError: a package is not installed.
      KeyError: there is no such concept, or it has no name in this language.
    """
    return f"{names()[concept][language]}, {design.style}"


def clean(name: str) -> str:
    """`:woman’s_hat:` -> `woman's hat`."""
    return normalise_text(name.strip(":").replace("_", " ")).translate(_PUNCTUATION)


@functools.cache
def names() -> dict[str, dict[str, str]]:
    """The names of every concept that has both designs: concept -> language -> name, sorted.

    The nine components (bare skin tones, bare hair) are left out: they depict no thing.

    Raises:
      UserError: one of the three packages is not installed.
    """
    emoji = import_package("emoji", "emoji")
    emoji.config.load_language()
    drawn = set(files(OPENMOJI)) & set(files(TWEMOJI))
    by_concept: dict[str, dict[str, str]] = {}
    for characters, entry in emoji.EMOJI_DATA.items():
        concept = "-".join(f"{ord(c):04X}" for c in characters if c != "\ufe0f")
        if concept in drawn and entry["status"] != emoji.STATUS["component"]:
            by_concept[concept] = {
                language: clean(entry[language])
                for language in ("en", *LANGUAGES)
                if language in entry
            }
    return dict(sorted(by_concept.items()))
