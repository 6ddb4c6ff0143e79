"""Further captions of the emoji: articles, other names, tags and languages."""

import pytest

from leon_jax.datasets.emoji import wordings
from leon_jax.datasets.emoji.captions import LANGUAGES, names
from leon_jax.datasets.emoji.npm_designs import ALL_DESIGNS, NPM_DESIGNS
from tests.datasets import npm_packages

CAT = "1F63A"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return npm_packages.write(tmp_path_factory.mktemp("npm"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("red heart", "a red heart"),
        ("umbrella", "an umbrella"),
        ("unicorn", "a unicorn"),
        ("eye", "an eye"),
        ("cactus", "a cactus"),
        ("glass", "a glass"),
        ("glasses", ""),
        ("people hugging", ""),
        ("Germany", ""),
        ("keycap 1", ""),
        ("1st place medal", ""),
    ],
)
def test_a_name_takes_its_article(name, expected):
    assert wordings.with_article(name) == expected


def test_english_wordings_have_an_article_a_short_name_and_tags(folder):
    tags = set(npm_packages.CATS["en"][0]["tags"])
    for design in ALL_DESIGNS:
        article, alias, two, three = wordings.english(folder, design, CAT)
        assert (article, alias) == ("a grinning cat", "smiley cat")
        for text, count in ((two, 2), (three, 3)):
            assert len(set(text.split(", ")) & tags) == len(text.split(", ")) == count


def test_designs_take_different_tags(folder):
    found = {wordings.english(folder, design, CAT)[2:] for design in ALL_DESIGNS}
    assert len(found) == len(ALL_DESIGNS)


def test_tags_of_a_skin_tone_name_it_and_abbreviations_are_left_out(folder):
    for design in ALL_DESIGNS:
        wordings_of_tone = wordings.english(folder, design, "1F44B-1F3FB")
        assert wordings_of_tone[0] == "a waving hand light skin tone"
        assert wordings_of_tone[-1] in wordings_of_tone
        for text in wordings_of_tone[1:]:
            *tags, tone = text.split(", ")
            assert tone == "light skin tone" and set(tags) <= {"hand", "hello", "wave"}


def test_a_concept_without_tags_has_fewer_wordings(folder):
    assert wordings.english(folder, ALL_DESIGNS[0], "1F3E0") == ("a house",)


def test_captions_are_bounded_and_name_every_style_once(folder):
    for concept in list(names())[::40]:
        for design in ALL_DESIGNS:
            captions = wordings.captions(folder, design, concept, names()[concept]["en"])
            assert 11 <= len(captions) <= wordings.MAX_CAPTIONS
            plain = names()[concept]["en"]
            assert captions.count(plain) == 5
            for style in ALL_DESIGNS:
                assert captions.count(f"{plain}, {style.style}") == 1


def test_the_designs_of_a_concept_have_all_languages_together(folder):
    found = [set(wordings.captions(folder, design, CAT, "grinning cat")) for design in ALL_DESIGNS]
    for language in LANGUAGES:
        assert sum(names()[CAT][language] in captions for captions in found) == 1
    everything = set.union(*found)
    assert {"a grinning cat", "grinsende katze"} <= everything
    assert {"gesicht, katzengesicht", "katzengesicht, gesicht"} & everything


def test_a_caption_in_another_language_keeps_the_english_name_as_a_variant(folder):
    captions = wordings.captions(folder, ALL_DESIGNS[1], CAT, "gato que sonríe")
    assert captions.count("gato que sonríe") == 5 and captions.count("grinning cat") == 1


def test_half_of_the_train_captions_are_the_english_name_and_a_quarter_foreign(folder):
    for design in NPM_DESIGNS:
        chosen = {c: wordings.train_name(folder, design, c) for c in names()}
        foreign = [c for c, (language, _) in chosen.items() if language != "en"]
        assert 0.22 < len(foreign) / len(chosen) < 0.28
        assert {language for language, _ in chosen.values()} == {"en", *LANGUAGES}
        for concept in foreign[::50]:
            language, name = chosen[concept]
            assert name == names()[concept][language]
        # These packages have few tags; some concepts have no other wording than their name.
        plain = sum(name == names()[c]["en"] for c, (_, name) in chosen.items())
        assert 0.48 < plain / len(chosen) < 0.65
