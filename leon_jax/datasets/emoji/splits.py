"""Which emoji pictures are held out, and what each split holds.

A *family* is a concept with its near-identical variants: skin tones, genders, directions, and
whatever else has an identical drawing. A family is held out as a whole or not at all.

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
from leon_jax.datasets.emoji.designs import DESIGNS, OPENMOJI, TWEMOJI, Design, render

SPLITS_FILE = pathlib.Path(__file__).with_name("splits.json")

_SALT = "leon_jax emoji 1"
_UNSEEN_CONCEPTS = 100
_UNSEEN_DESIGNS = 200
_LARGEST_FAMILY = 18
_COUPLES = {
    "1F46B": "1F9D1-200D-1F91D-200D-1F9D1",  # holding hands
    "1F46C": "1F9D1-200D-1F91D-200D-1F9D1",
    "1F46D": "1F9D1-200D-1F91D-200D-1F9D1",
    "1F48F": "1F9D1-200D-2764-200D-1F48B-200D-1F9D1",  # kiss
    "1F491": "1F9D1-200D-2764-200D-1F9D1",  # with heart
}


@dataclasses.dataclass(frozen=True)
class Splits:
    """The held-out concepts, in evaluation order, and what was learned by drawing everything.

    Attributes:
      unseen_concept: both designs are held out.
      unseen_design: only the Twemoji design is held out.
      twins: families that share a drawing with another one, each mapped to the one it joins.
      empty: concepts dropped because a design of them draws nothing.
    """

    unseen_concept: tuple[str, ...]
    unseen_design: tuple[str, ...]
    twins: Mapping[str, str]
    empty: tuple[str, ...]

    def family(self, concept: str) -> str:
        """The family of a concept, identical drawings of other families included."""
        return self.twins.get(family(concept), family(concept))


def family(concept: str) -> str:
    """The concept without skin tone, gender sign and direction, man and woman being person.

    >>> family("1F468-1F3FB-200D-1F680")
    '1F9D1-200D-1F680'
    """
    concept = re.sub(r"-1F3F[B-F]", "", concept)
    concept = re.sub(r"-200D-(2640|2642|27A1)", "", concept)
    concept = re.sub(r"1F468|1F469", "1F9D1", concept)
    return _COUPLES.get(concept, concept)


def fraction(*words: str) -> float:
    """A number in [0, 1) that depends on the words alone: the coin of every split decision."""
    digest = hashlib.sha256("\x00".join((_SALT, *words)).encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64


def caption_language(concept: str) -> str:
    """The language of the Twemoji caption in train: English, or for a quarter another one."""
    if fraction("foreign", concept) >= 0.25:
        return "en"
    return LANGUAGES[int(fraction("language", concept) * len(LANGUAGES))]


def compute_splits() -> Splits:
    """Chooses what is held out; draws every picture once (about 20 s) to find equal ones.

    Families are taken in hash order; one that would overshoot the wanted number is skipped, and so
    is one with more members than three genders in six skin tones (the couples, in 26 pairs of skin
    tones, would fill a split). The result depends on the packages alone, and `splits.json` is its
    record.
    """
    concepts = list(names())
    drawn: dict[bytes, list[str]] = collections.defaultdict(list)
    empty = []
    for concept in concepts:
        pictures = [render(design, concept) for design in DESIGNS]
        if any(picture.min() == picture.max() for picture in pictures):
            empty.append(concept)
            continue
        for picture in pictures:
            drawn[hashlib.sha256(picture.tobytes()).digest()].append(concept)
    merged = _merge([family(c) for c in group] for group in drawn.values())
    concepts = [c for c in concepts if c not in set(empty)]

    members: dict[str, list[str]] = collections.defaultdict(list)
    for concept in concepts:
        members[merged[family(concept)]].append(concept)
    order = [name for name in members if len(members[name]) <= _LARGEST_FAMILY]
    order.sort(key=lambda name: fraction("split", name))
    unseen_concept = _take(order, members, _UNSEEN_CONCEPTS)
    order = [name for name in order if name not in unseen_concept]
    unseen_design = _take(order, members, _UNSEEN_DESIGNS)
    return Splits(
        unseen_concept=_interleave(unseen_concept, members),
        unseen_design=_interleave(unseen_design, members),
        twins={name: least for name, least in sorted(merged.items()) if name != least},
        empty=tuple(empty),
    )


@functools.cache
def load_splits() -> Splits:
    """The committed record of `compute_splits`."""
    values = json.loads(SPLITS_FILE.read_text())
    return Splits(
        unseen_concept=tuple(values["unseen_concept"]),
        unseen_design=tuple(values["unseen_design"]),
        twins=values["twins"],
        empty=tuple(values["empty"]),
    )


def splits_json(splits: Splits) -> str:
    """What `splits.json` holds: the splits and the packages they were computed from."""
    packages = ("emoji", OPENMOJI.package, TWEMOJI.package)
    versions = {package: importlib.metadata.version(package) for package in packages}
    values = {"packages": versions, **dataclasses.asdict(splits)}
    return json.dumps(values, indent=1) + "\n"


def members() -> dict[str, list[tuple[Design, str, str]]]:
    """What each split holds, in order: (design, concept, language of the caption).

    Raises:
      UserError: the packages lack a concept that `splits.json` names.
    """
    splits = load_splits()
    unseen_concept, unseen_design = set(splits.unseen_concept), set(splits.unseen_design)
    missing = (unseen_concept | unseen_design) - set(names())
    if missing:
        recorded = json.loads(SPLITS_FILE.read_text())["packages"]
        wanted = " ".join(f"{name}=={version}" for name, version in recorded.items())
        raise UserError(
            f"the installed emoji packages lack {', '.join(sorted(missing)[:3])}, which the "
            f"held-out splits name; run: pip install {wanted}"
        )
    # With other package versions there may be new variants of held-out concepts.
    held = {splits.family(c) for c in unseen_concept}, {splits.family(c) for c in unseen_design}
    train = []
    for concept in names():
        if concept in splits.empty or splits.family(concept) in held[0]:
            continue
        train.append((OPENMOJI, concept, "en"))
        if splits.family(concept) not in held[1]:
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
    """Union of overlapping groups: each member -> the least member of its union."""
    root: dict[str, str] = {}

    def find(name: str) -> str:
        while root.setdefault(name, name) != name:
            name = root[name]
        return name

    for group in groups:
        roots = {find(name) for name in group}
        least = min(roots)
        root.update(dict.fromkeys(roots, least))
    return {name: find(name) for name in list(root)}


def _take(order: list[str], members: Mapping[str, list[str]], wanted: int) -> list[str]:
    taken = []
    for name in order:
        if len(members[name]) <= wanted:
            taken.append(name)
            wanted -= len(members[name])
    return taken


def _interleave(families: list[str], members: Mapping[str, list[str]]) -> tuple[str, ...]:
    """One concept of each family, then a second of each, ...: any first few are most diverse."""
    rounds = max(len(members[name]) for name in families)
    return tuple(
        sorted(members[name], key=lambda c: fraction("order", c))[index]
        for index in range(rounds)
        for name in families
        if index < len(members[name])
    )


if __name__ == "__main__":
    SPLITS_FILE.write_text(splits_json(compute_splits()))
