"""Chooses the held-out emoji images and lists the members of each split.

A *family* is a concept with its nearly identical variants: skin tones, genders, directions and
concepts with an identical drawing. Either all members of a family are held out, or none.

`python -m leon_jax.datasets.emoji.splits` writes `splits.json`, the committed record.
"""

import collections
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import pathlib
import re
from collections.abc import Iterable, Mapping

from leon_jax.config import UserError
from leon_jax.datasets.emoji.captions import LANGUAGES, names
from leon_jax.datasets.emoji.designs import DESIGNS, OPENMOJI, TWEMOJI, PyPIDesign, render

SPLITS_FILE = pathlib.Path(__file__).with_name("splits.json")

_SALT = "leon_jax emoji 1"
_UNSEEN_CONCEPTS = 100
UNSEEN_DESIGNS = 200
MAX_FAMILY_SIZE = 18
_COUPLES = {
    "1F46B": "1F9D1-200D-1F91D-200D-1F9D1",  # holding hands
    "1F46C": "1F9D1-200D-1F91D-200D-1F9D1",
    "1F46D": "1F9D1-200D-1F91D-200D-1F9D1",
    "1F48F": "1F9D1-200D-2764-200D-1F48B-200D-1F9D1",  # kiss
    "1F491": "1F9D1-200D-2764-200D-1F9D1",  # with heart
}


@dataclasses.dataclass(frozen=True)
class Splits:
    """The held-out concepts, in evaluation order, and facts about the rendered images.

    Attributes:
      unseen_concept: concepts with both designs held out.
      unseen_design: concepts with only the Twemoji design held out.
      twins: families that share a drawing with another family, each mapped to that family.
      empty: concepts that are dropped because one of their drawings is blank.
    """

    unseen_concept: tuple[str, ...]
    unseen_design: tuple[str, ...]
    twins: Mapping[str, str]
    empty: tuple[str, ...]

    def family(self, concept: str) -> str:
        """Returns the family of a concept; families with identical drawings are joined."""
        return self.twins.get(family(concept), family(concept))


def family(concept: str) -> str:
    """Removes skin tone, gender sign and direction from a concept; man and woman become person.

    >>> family("1F468-1F3FB-200D-1F680")
    '1F9D1-200D-1F680'
    """
    concept = re.sub(r"-1F3F[B-F]", "", concept)
    concept = re.sub(r"-200D-(2640|2642|27A1)", "", concept)
    concept = re.sub(r"1F468|1F469", "1F9D1", concept)
    return _COUPLES.get(concept, concept)


def fraction(*words: str) -> float:
    """Returns a hash of the words as a number in [0, 1), the random number of a split decision."""
    digest = hashlib.sha256("\x00".join((_SALT, *words)).encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64


def caption_language(concept: str) -> str:
    """Returns the language of a Twemoji caption in train: English, or another for a quarter."""
    if fraction("foreign", concept) >= 0.25:
        return "en"
    return LANGUAGES[int(fraction("language", concept) * len(LANGUAGES))]


def compute_splits() -> Splits:
    """Chooses the held-out concepts. It renders all images (about 20 s) to find identical ones.

    Families are taken in the order of their hashes. A family is skipped if it would exceed the size
    of the split, or if it has more members than three genders in six skin tones (couples, with 26
    pairs of skin tones, would fill a split). The result depends only on the packages; `splits.json`
    records it.
    """
    concepts = list(names())
    by_digest: dict[bytes, list[str]] = collections.defaultdict(list)
    empty = []
    for concept in concepts:
        images = [render(design, concept) for design in DESIGNS]
        if any(image.min() == image.max() for image in images):
            empty.append(concept)
            continue
        for image in images:
            by_digest[hashlib.sha256(image.tobytes()).digest()].append(concept)
    merged = _merge([family(concept) for concept in group] for group in by_digest.values())
    concepts = [concept for concept in concepts if concept not in set(empty)]

    members: dict[str, list[str]] = collections.defaultdict(list)
    for concept in concepts:
        members[merged[family(concept)]].append(concept)
    order = [name for name in members if len(members[name]) <= MAX_FAMILY_SIZE]
    order.sort(key=lambda name: fraction("split", name))
    unseen_concept = take(order, members, _UNSEEN_CONCEPTS)
    order = [name for name in order if name not in unseen_concept]
    unseen_design = take(order, members, UNSEEN_DESIGNS)
    return Splits(
        unseen_concept=interleave(unseen_concept, members),
        unseen_design=interleave(unseen_design, members),
        twins={name: joined for name, joined in sorted(merged.items()) if name != joined},
        empty=tuple(empty),
    )


@functools.cache
def load_splits() -> Splits:
    """Reads `splits.json`, the committed result of `compute_splits`."""
    values = json.loads(SPLITS_FILE.read_text())
    return Splits(
        unseen_concept=tuple(values["unseen_concept"]),
        unseen_design=tuple(values["unseen_design"]),
        twins=values["twins"],
        empty=tuple(values["empty"]),
    )


def splits_json(splits: Splits) -> str:
    """Returns the content of `splits.json`: the splits and the versions of the packages."""
    packages = ("emoji", OPENMOJI.package, TWEMOJI.package)
    versions = {package: importlib.metadata.version(package) for package in packages}
    values = {"packages": versions, **dataclasses.asdict(splits)}
    return json.dumps(values, indent=1) + "\n"


def members() -> dict[str, list[tuple[PyPIDesign, str, str]]]:
    """Returns the members of each split, in order: (design, concept, language of the caption).

    Raises:
      UserError: the packages lack a concept that `splits.json` names.
    """
    splits = load_splits()
    unseen_concept, unseen_design = set(splits.unseen_concept), set(splits.unseen_design)
    missing = (unseen_concept | unseen_design) - set(names())
    if missing:
        recorded = json.loads(SPLITS_FILE.read_text())["packages"]
        versions = " ".join(f"{name}=={version}" for name, version in recorded.items())
        raise UserError(
            f"the installed emoji packages lack {', '.join(sorted(missing)[:3])}, which the "
            f"held-out splits name; run: pip install {versions}"
        )
    # Compare families: other package versions may have new variants of held-out concepts.
    unseen_concept_families = {splits.family(concept) for concept in unseen_concept}
    unseen_design_families = {splits.family(concept) for concept in unseen_design}
    train = []
    for concept in names():
        if concept in splits.empty or splits.family(concept) in unseen_concept_families:
            continue
        train.append((OPENMOJI, concept, "en"))
        if splits.family(concept) not in unseen_design_families:
            language = caption_language(concept)
            language = language if language in names()[concept] else "en"
            train.append((TWEMOJI, concept, language))
    train.sort(key=lambda member: fraction("train", member[0].name, member[1]))
    return {
        "train": train,
        "unseen_design": [(TWEMOJI, concept, "en") for concept in splits.unseen_design],
        "unseen_concept": [
            (design, concept, "en") for concept in splits.unseen_concept for design in DESIGNS
        ],
    }


def _merge(groups: Iterable[list[str]]) -> dict[str, str]:
    """Joins overlapping groups and maps each member to the smallest member of its joined group."""
    parents: dict[str, str] = {}

    def find_root(name: str) -> str:
        while parents.setdefault(name, name) != name:
            name = parents[name]
        return name

    for group in groups:
        roots = {find_root(name) for name in group}
        parents.update(dict.fromkeys(roots, min(roots)))
    return {name: find_root(name) for name in list(parents)}


def take(order: list[str], members: Mapping[str, list[str]], count: int) -> list[str]:
    """Returns the first families, in order, that together have at most `count` members."""
    taken = []
    for name in order:
        if len(members[name]) <= count:
            taken.append(name)
            count -= len(members[name])
    return taken


def interleave(families: list[str], members: Mapping[str, list[str]]) -> tuple[str, ...]:
    """Lists one concept per family, then a second per family, ..., so any prefix is diverse."""
    rounds = max(len(members[name]) for name in families)
    return tuple(
        sorted(members[name], key=lambda c: fraction("order", c))[index]
        for index in range(rounds)
        for name in families
        if index < len(members[name])
    )


if __name__ == "__main__":
    SPLITS_FILE.write_text(splits_json(compute_splits()))
