"""Licences: which texts are valid expressions, and which ones a list allows."""

import pytest

from leon_jax.config import UserError
from leon_jax.prepare import licences
from leon_jax.prepare.config import LICENCES


@pytest.mark.parametrize(
    ("stated", "spdx"),
    [
        ("CC-BY-4.0", "CC-BY-4.0"),
        (" cc-by-sa-3.0 ", "CC-BY-SA-3.0"),
        ("mit or apache-2.0", "MIT OR Apache-2.0"),
        ("https://creativecommons.org/licenses/by/2.0/", "CC-BY-2.0"),
        ("http://creativecommons.org/licenses/by-nc-sa/4.0/deed.de", "CC-BY-NC-SA-4.0"),
        ("https://creativecommons.org/publicdomain/zero/1.0/", "CC0-1.0"),
        ("LicenseRef-Shutterstock", "LicenseRef-Shutterstock"),
        ("LicenseRef-Apache-2.0", "LicenseRef-Apache-2.0"),
        ("cc-by-4.0 or LicenseRef-Mine", "CC-BY-4.0 OR LicenseRef-Mine"),
    ],
)
def test_valid_licences_are_normalised(stated, spdx):
    assert licences.normal(stated) == spdx


@pytest.mark.parametrize(
    "stated",
    [
        "",
        "?",
        "unknown",
        "free to use",
        "CC-BY",
        "(((",
        "MIT AND",
        "MIT OR LicenseRef-two words",
        "MIT OR unknown",
        "MIT OR LicenseRef-Apache-2.0",
        "MIT WITH LicenseRef-Mine",
        "MIT " * 5000,
        "MIT" + " " * 400 + "AND GPL-3.0-only",
        "\0",
        "©",
    ],
)
def test_invalid_licences_give_none(stated):
    assert licences.normal(stated) is None


@pytest.mark.parametrize(
    ("expression", "allowed"),
    [
        ("MIT", True),
        ("GPL-3.0-only", False),
        ("GPL-3.0-only OR MIT", True),
        ("LicenseRef-Mine OR MIT", True),
        ("LicenseRef-Mine AND MIT", False),
        ("GPL-3.0-only AND MIT", False),
        ("MIT AND (GPL-3.0-only OR CC0-1.0)", True),
        ("GPL-2.0-only WITH Classpath-exception-2.0", False),
    ],
)
def test_a_list_allows_expressions_of_its_licences(expression, allowed):
    assert licences.allows(("MIT", "CC0-1.0", "GPL-2.0-only"), expression) is allowed


def test_the_default_list_is_valid_and_other_names_raise_an_error():
    licences.check_list(LICENCES)
    with pytest.raises(UserError, match=r"'cc-by-4\.0', .* did you mean 'CC-BY-4\.0'"):
        licences.check_list(("cc-by-4.0",))
