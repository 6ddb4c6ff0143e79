"""Captions of the emoji, with names in 14 languages from the package `emoji`."""

import functools

from leon_jax.datasets.emoji.designs import (
    DESIGNS,
    OPENMOJI,
    TWEMOJI,
    Design,
    files,
    import_package,
)
from leon_jax.documents import normalise_text

# The languages of the names besides English.
LANGUAGES = ("es", "ja", "ko", "pt", "it", "fr", "de", "fa", "id", "zh", "ru", "tr", "ar")
_PUNCTUATION = str.maketrans(
    dict.fromkeys("\u2018\u2019", "'") | dict.fromkeys("\u201c\u201d«»", '"')
)


def caption(design: Design, concept: str, language: str) -> str:
    """Returns the caption of an image: name and style, for example "cat face, OpenMoji style".

    Raises:
      UserError: a package is not installed.
      KeyError: the concept does not exist, or has no name in this language.
    """
    return f"{names()[concept][language]}, {design.style}"


def variants(caption: str) -> tuple[str, ...]:
    """Returns the captions that the encoder is trained with: half of them name no style.

    The other half name each style once, whatever the style of the image. So the encoder learns to
    ignore the style: retrieval should match concepts, not styles.

    Args:
      caption: name and style, as `caption` returns them.
    """
    name = caption.rpartition(", ")[0]
    return (name,) * len(DESIGNS) + tuple(f"{name}, {design.style}" for design in DESIGNS)


def clean(name: str) -> str:
    """Converts a name of the package `emoji` to plain text: `:woman’s_hat:` -> `woman's hat`."""
    return normalise_text(name.strip(":").replace("_", " ")).translate(_PUNCTUATION)


@functools.cache
def names() -> dict[str, dict[str, str]]:
    """Returns the names of all concepts that have both designs: concept -> language -> name.

    The concepts are sorted. The nine components (skin tones and hair) are left out, because they
    are not emoji by themselves.

    Raises:
      UserError: one of the three packages is not installed.
    """
    emoji = import_package("emoji", "emoji")
    emoji.config.load_language()
    concepts = set(files(OPENMOJI)) & set(files(TWEMOJI))
    by_concept: dict[str, dict[str, str]] = {}
    for characters, entry in emoji.EMOJI_DATA.items():
        concept = "-".join(f"{ord(c):04X}" for c in characters if c != "\ufe0f")
        if concept in concepts and entry["status"] != emoji.STATUS["component"]:
            by_concept[concept] = {
                language: clean(entry[language])
                for language in ("en", *LANGUAGES)
                if language in entry
            }
    return dict(sorted(by_concept.items()))
