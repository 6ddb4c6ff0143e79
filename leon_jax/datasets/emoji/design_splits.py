r"""Chooses the held-out images of the designs in npm packages.

    python -m leon_jax.datasets.emoji.design_splits data/npm

writes `design_splits.json`, the committed record, and prints what was found.

The held-out concepts of `splits.json` are held out in every design. Of each design in an npm
package, 200 more images are held out, by the rule that chose the Twemoji images of `splits.json`.
Designs may copy each other, for example geometric shapes. So all held-out images are compared with
all train images, and of two that are nearly the same one is left out.
"""

import collections
import dataclasses
import functools
import json
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Mapping

import numpy as np
from jaxtyping import Float32

from leon_jax.config import UserError
from leon_jax.datasets.emoji import splits
from leon_jax.datasets.emoji.captions import names
from leon_jax.datasets.emoji.designs import OPENMOJI, TWEMOJI, Design
from leon_jax.datasets.emoji.npm_designs import (
    ALL_DESIGNS,
    NPM_DESIGNS,
    PACKAGES,
    NpmDesign,
    check_packages,
    concepts,
    render,
)
from leon_jax.datasets.emoji.similar_images import NearCopy, near_copies, signature
from leon_jax.datasets.emoji.wordings import train_name

SPLITS_FILE = pathlib.Path(__file__).with_name("design_splits.json")
_RENDERED = 64  # pixels; side of the images that are compared


@dataclasses.dataclass(frozen=True)
class DesignSplits:
    """The held-out images of the designs in npm packages, and what was found in all designs.

    Attributes:
      unseen_design: for each design the concepts that only this design (and others of its artist)
        holds out, in evaluation order.
      left_out: keys of images that are in no split: blank ones, and near copies.
      near_copies: pairs of a held-out image and a train image, before images were left out.
    """

    unseen_design: Mapping[str, tuple[str, ...]]
    left_out: tuple[str, ...]
    near_copies: tuple[NearCopy, ...]


@dataclasses.dataclass(frozen=True)
class Member:
    """An image of a split.

    Attributes:
      design: the design.
      concept: the concept.
      language: the language of the caption.
      name: the caption without the style.
    """

    design: Design
    concept: str
    language: str
    name: str


def members(folder: str | os.PathLike) -> dict[str, list[Member]]:
    """Returns the members of each split, in order.

    The members of `splits.members` keep their captions. In the held-out splits they come first.

    Args:
      folder: the folder of the npm packages.

    Raises:
      UserError: a package is missing, or has another version.
    """
    check_packages(folder)
    recorded = load()
    result = {
        split: [
            Member(design, concept, language, names()[concept][language])
            for design, concept, language in listed
        ]
        for split, listed in splits.members().items()
    }
    left_out = set(recorded.left_out)
    for design in NPM_DESIGNS:
        available = concepts(folder, design)
        split_of = _split_of(design, recorded.unseen_design)
        listed = {
            "train": names(),
            "unseen_design": recorded.unseen_design[design.name],
            "unseen_concept": splits.load_splits().unseen_concept,
        }
        for split, candidates in listed.items():
            for concept in candidates:
                is_used = concept in available and f"{design.name}/{concept}" not in left_out
                if is_used and split_of(concept) == split:
                    language, name = "en", names()[concept]["en"]
                    if split == "train":
                        language, name = train_name(folder, design, concept)
                    result[split].append(Member(design, concept, language, name))
    result["train"].sort(key=lambda m: splits.fraction("train", m.design.name, m.concept))
    return result


def compute(folder: str | os.PathLike) -> DesignSplits:
    """Chooses the held-out images. It renders all images (about a minute).

    Args:
      folder: the folder of the npm packages.

    Raises:
      UserError: a package is missing, or has another version.
    """
    check_packages(folder)
    signatures = {}
    for design in ALL_DESIGNS:
        for concept in sorted(concepts(folder, design) & set(names())):
            pixels = render(folder, design, concept, _RENDERED)
            signatures[f"{design.name}/{concept}"] = signature(pixels)
    return choose(signatures)


def choose(signatures: Mapping[str, Float32[np.ndarray, "pixels"]]) -> DesignSplits:
    """Chooses the held-out images of the designs in npm packages.

    Args:
      signatures: `signature` of every image, by key.
    """
    blank = [key for key, ink in signatures.items() if not ink.any()]
    keys = [key for key in signatures if key not in set(blank)]
    unseen_design = _held_out_designs(keys)
    split_of_key: dict[str, str] = {}
    for design in ALL_DESIGNS:
        split_of = _split_of(design, unseen_design)
        prefix = f"{design.name}/"
        split_of_key |= {
            key: split_of(key[len(prefix) :]) for key in keys if key.startswith(prefix)
        }
    held_out = [key for key in keys if split_of_key[key] != "train"]
    train = [key for key in keys if split_of_key[key] == "train"]
    found = near_copies(signatures, held_out, train)
    left_out = {*blank}
    for copy in found:
        # The images of `splits.json` stay. Otherwise the held-out image is left out.
        if not _is_recorded(copy.held_out):
            left_out.add(copy.held_out)
        elif not _is_recorded(copy.train):
            left_out.add(copy.train)
    return DesignSplits(
        {
            name: tuple(concept for concept in listed if f"{name}/{concept}" not in left_out)
            for name, listed in unseen_design.items()
        },
        tuple(sorted(left_out)),
        tuple(found),
    )


@functools.cache
def load() -> DesignSplits:
    """Reads `design_splits.json`, the committed result of `compute`."""
    values = json.loads(SPLITS_FILE.read_text())
    return DesignSplits(
        {name: tuple(concepts) for name, concepts in values["unseen_design"].items()},
        tuple(values["left_out"]),
        tuple(NearCopy(*copy) for copy in values["near_copies"]),
    )


def to_json(chosen: DesignSplits) -> str:
    """Returns the content of `design_splits.json`: the splits and the versions of the packages."""
    values = {
        "packages": PACKAGES,
        "unseen_design": chosen.unseen_design,
        "left_out": chosen.left_out,
        "near_copies": [dataclasses.astuple(copy) for copy in chosen.near_copies],
    }
    text = json.dumps(values, indent=1)
    # A pair takes one line.
    return re.sub(r'\[\s+("[^"]+"),\s+("[^"]+"),\s+([\d.]+)\s+\]', r"[\1, \2, \3]", text) + "\n"


def _held_out_designs(keys: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Returns for each design in an npm package the concepts to hold out, before the comparison."""
    recorded = splits.load_splits()
    unseen_families = {recorded.family(concept) for concept in recorded.unseen_concept}
    present: dict[str, set[str]] = collections.defaultdict(set)
    for key in keys:
        name, _, concept = key.partition("/")
        present[name].add(concept)
    result: dict[str, tuple[str, ...]] = {}
    for artist in dict.fromkeys(design.artist for design in NPM_DESIGNS):
        designs = [design.name for design in NPM_DESIGNS if design.artist == artist]
        by_family: dict[str, list[str]] = collections.defaultdict(list)
        for concept in sorted(set().union(*(present[name] for name in designs))):
            if recorded.family(concept) not in unseen_families:
                by_family[recorded.family(concept)].append(concept)
        order = [name for name in by_family if len(by_family[name]) <= splits.MAX_FAMILY_SIZE]
        order.sort(key=lambda name: splits.fraction("split", artist, name))
        taken = splits.take(order, by_family, splits.UNSEEN_DESIGNS)
        chosen = splits.interleave(taken, by_family) if taken else ()
        result |= {name: tuple(c for c in chosen if c in present[name]) for name in designs}
    return result


def _split_of(design: Design, unseen_design: Mapping[str, tuple[str, ...]]) -> Callable[[str], str]:
    """Returns a function from a concept to the split of its image in this design.

    Families decide, so that nearly identical concepts are in one split. What one design of an
    artist holds out, no other design of the artist trains on.
    """
    recorded = splits.load_splits()
    held_out = recorded.unseen_design if design == TWEMOJI else ()
    if isinstance(design, NpmDesign):
        alike = (other.name for other in NPM_DESIGNS if other.artist == design.artist)
        held_out = tuple(concept for name in alike for concept in unseen_design[name])
    by_split = {"unseen_concept": recorded.unseen_concept, "unseen_design": held_out}
    families = {
        split: {recorded.family(concept) for concept in concepts}
        for split, concepts in by_split.items()
    }

    def split_of(concept: str) -> str:
        family = recorded.family(concept)
        return next((split for split in families if family in families[split]), "train")

    return split_of


def _is_recorded(key: str) -> bool:
    """Tells whether the split of an image is that of `splits.json`, which never changes."""
    return key.partition("/")[0] in (OPENMOJI.name, TWEMOJI.name)


def main(argv: list[str]) -> None:
    """Writes `design_splits.json` for the npm packages in a folder.

    Raises:
      UserError: the folder is not given, or lacks a package.
    """
    if len(argv) != 2:
        raise UserError("give the folder of the npm packages, for example data/npm")
    chosen = compute(argv[1])
    SPLITS_FILE.write_text(to_json(chosen))
    for name, held_out in chosen.unseen_design.items():
        print(f"{name}: {len(held_out)} held-out designs")
    print(f"{len(chosen.left_out)} images are left out")
    for copy in chosen.near_copies:
        print(f"{copy.held_out} is nearly {copy.train} ({copy.distance})")


if __name__ == "__main__":
    try:
        main(sys.argv)
    except UserError as error:
        print(f"design_splits: {error}", file=sys.stderr)
        sys.exit(2)
