"""Further wordings of the emoji captions: names with an article, other names, tags, languages.

Names come from the package `emoji`, tags from the npm package `emojibase-data`. Both have them from
the Unicode CLDR. Every choice is a hash, so captions depend only on the packages.
"""

import dataclasses
import functools
import os
import re
from collections.abc import Mapping

from leon_jax.datasets.emoji.captions import LANGUAGES, clean, names
from leon_jax.datasets.emoji.designs import Design, concept_of, import_package
from leon_jax.datasets.emoji.npm_designs import ALL_DESIGNS, read_json
from leon_jax.datasets.emoji.splits import fraction
from leon_jax.documents import normalise_text

# The languages of `LANGUAGES` that emojibase-data has.
TAG_LANGUAGES = ("es", "ja", "ko", "pt", "it", "fr", "de", "zh", "ru")
# The largest number of captions of a document.
MAX_CAPTIONS = 24

_NAMES_PER_DESIGN = 3  # languages of the captions of one image; five designs have all thirteen
_ALIASES = 2
_SHORT, _LONG = 2, 3  # tags of a caption
_COLON = re.compile(r"\s*[:：]\s*")
# Words with a vowel letter that begin with a consonant, and so take "a".
_CONSONANT_SOUND = ("uni", "us", "eu", "one", "ut")
_PLURALS = ("people", "men", "women")


@dataclasses.dataclass(frozen=True)
class Tags:
    """What emojibase-data says of a concept in one language.

    Attributes:
      words: the tags, in the order of the package.
      detail: what tells the concept from others with these tags, such as a skin tone; or "".
    """

    words: tuple[str, ...]
    detail: str


def english(folder: str | os.PathLike, design: Design, concept: str) -> tuple[str, ...]:
    """Returns English wordings for a concept besides its name, at most five.

    They are the name with an article ("a grinning cat"), other names ("smiley cat"), two tags
    ("smiling, cat") and three tags ("cat, smile, animal"). The tags differ from design to design.

    Args:
      folder: the folder of the npm packages.
      design: one of `ALL_DESIGNS`.
      concept: a concept of `captions.names`.

    Raises:
      UserError: a package is missing or damaged.
    """
    name = names()[concept]["en"]
    found = [with_article(name), *_aliases().get(concept, ())[:_ALIASES]]
    tags = read_tags(os.fspath(folder), "en").get(concept)
    found += [_tag_text(design, concept, tags, count) for count in (_SHORT, _LONG)]
    return tuple(text for text in dict.fromkeys(found) if text and text != name)


def train_name(folder: str | os.PathLike, design: Design, concept: str) -> tuple[str, str]:
    """Returns the language and the words of a caption in train, for a design of an npm package.

    Half of the captions have the English name, a quarter a name in another language, and a quarter
    another English wording.

    Raises:
      UserError: a package is missing or damaged.
    """
    by_language, share = names()[concept], fraction("wording", design.name, concept)
    if share < 0.25:
        number = int(fraction("language", design.name, concept) * len(LANGUAGES))
        language = LANGUAGES[number] if LANGUAGES[number] in by_language else "en"
        return language, by_language[language]
    others = english(folder, design, concept)
    if share < 0.5 and others:
        return "en", others[int(fraction("words", design.name, concept) * len(others))]
    return "en", by_language["en"]


def captions(folder: str | os.PathLike, design: Design, concept: str, name: str) -> tuple[str, ...]:
    """Returns the captions that the encoder is trained with, at most `MAX_CAPTIONS`.

    About a quarter are the name without a style. Another quarter name each style once, whatever the
    style of the image, so that the encoder learns to ignore it. The others are further English
    wordings, and names and tags in other languages. The languages differ from design to design;
    together the designs of a concept have all.

    Args:
      folder: the folder of the npm packages.
      design: one of `ALL_DESIGNS`.
      concept: a concept of `captions.names`.
      name: the caption of the document without the style.

    Raises:
      UserError: a package is missing or damaged.
    """
    by_language = names()[concept]
    languages = sorted(
        (language for language in LANGUAGES if language in by_language),
        key=lambda language: fraction("names", concept, language),
    )
    start = ALL_DESIGNS.index(design) * _NAMES_PER_DESIGN
    others = [by_language["en"], *english(folder, design, concept)]
    for language in languages[start : start + _NAMES_PER_DESIGN]:
        others.append(by_language[language])
        if language in TAG_LANGUAGES:
            tags = read_tags(os.fspath(folder), language).get(concept)
            others.append(_tag_text(design, concept, tags, _SHORT))
    others = [text for text in dict.fromkeys(others) if text and text != name]
    styled = [f"{name}, {other.style}" for other in ALL_DESIGNS]
    return (*([name] * len(ALL_DESIGNS)), *styled, *others)[:MAX_CAPTIONS]


def with_article(name: str) -> str:
    """Returns a name with "a" or "an", or "" if the name takes no article.

    Proper names (in upper case), names with numbers, and plurals take none.

    >>> with_article("red heart"), with_article("umbrella"), with_article("glasses")
    ('a red heart', 'an umbrella', '')
    """
    is_plural = name.endswith("s") and not name.endswith(("ss", "us"))
    is_plural = is_plural or name.startswith(_PLURALS)
    if is_plural or not name[:1].islower() or any(map(str.isdigit, name)):
        return ""
    vowel = name[0] in "aeiou" and not name.startswith(_CONSONANT_SOUND)
    return f"{'an' if vowel else 'a'} {name}"


@functools.lru_cache(maxsize=32)
def read_tags(folder: str, language: str) -> Mapping[str, Tags]:
    """Returns the tags of all concepts that emojibase-data has in a language.

    Raises:
      UserError: the package is missing or damaged.
    """
    found = {}
    for entry in read_json(folder, "emojibase-data", f"{language}/data.json"):
        words = [clean(tag) for tag in entry.get("tags", ())]
        words = [word for word in words if _is_word(word)]
        # A skin tone has the tags of the emoji without it.
        for variant in (entry, *entry.get("skins", ())):
            detail = "".join(_COLON.split(variant["label"], maxsplit=1)[1:])
            found[concept_of(variant["hexcode"])] = Tags(tuple(words), normalise_text(detail))
    return found


@functools.cache
def _aliases() -> dict[str, list[str]]:
    """Returns the short names of the package `emoji`, by concept."""
    emoji = import_package("emoji", "emoji")
    found: dict[str, list[str]] = {}
    for characters, entry in emoji.EMOJI_DATA.items():
        words = [clean(alias) for alias in entry.get("alias", ())]
        concept = concept_of("-".join(f"{ord(c):04X}" for c in characters))
        found.setdefault(concept, []).extend(word for word in words if _is_word(word))
    return found


def _is_word(text: str) -> bool:
    """Tells whether a tag or short name is made of letters, and is no abbreviation.

    Without a vowel it is one, such as "ttyl".
    """
    letters = re.sub(r"[ '-]", "", text)
    is_short = letters.isascii() and (len(letters) < 3 or not set(letters) & set("aeiou"))
    return letters.isalpha() and not is_short


def _tag_text(design: Design, concept: str, tags: Tags | None, count: int) -> str:
    """Returns some tags of a concept as one text, or "" if it has too few."""
    if tags is None or len(tags.words) < count:
        return ""
    # Each design and each number of tags has an order of its own.
    words = sorted(
        tags.words, key=lambda word: fraction("tag", str(count), design.name, concept, word)
    )
    return ", ".join((*words[:count], tags.detail) if tags.detail else words[:count])
