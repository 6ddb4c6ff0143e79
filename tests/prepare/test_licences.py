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
        ("GPL-2.0", "GPL-2.0-only"),
    ],
)
def test_valid_licences_are_normalised(stated, spdx):
    assert licences.normal(stated) == spdx


@pytest.mark.parametrize(
    ("stated", "spdx"),
    [
        ("CC BY 4.0", "CC-BY-4.0"),
        ("CC-BY 4.0", "CC-BY-4.0"),
        ("ccby4.0", "CC-BY-4.0"),
        ("CC_BY_SA_2.5", "CC-BY-SA-2.5"),
        ("Creative Commons Attribution 4.0", "CC-BY-4.0"),
        ("Creative Commons Attribution 4.0 International License", "CC-BY-4.0"),
        ("Creative Commons Attribution-ShareAlike 3.0 Unported", "CC-BY-SA-3.0"),
        ("Creative Commons Attribution-NonCommercial-NoDerivs 2.0 Generic", "CC-BY-NC-ND-2.0"),
        ("CC BY-SA-NC 4.0", "CC-BY-NC-SA-4.0"),
        ("creativecommons.org/licenses/by/4.0", "CC-BY-4.0"),
        ("https://creativecommons.org/licenses/by/3.0/de/", "CC-BY-3.0-DE"),
        ("https://creativecommons.org/licenses/by/4.0/legalcode.de", "CC-BY-4.0"),
        ("https://creativecommons.org/publicdomain/mark/1.0/", "LicenseRef-Public-Domain-Mark"),
        ("CC0", "CC0-1.0"),
        ("CC0 1.0 Universal", "CC0-1.0"),
        ("public domain", "LicenseRef-Public-Domain"),
        ("Public-Domain", "LicenseRef-Public-Domain"),
        ("in the public domain", "LicenseRef-Public-Domain"),
        ("MIT License", "MIT"),
        ("The MIT License", "MIT"),
        ("Expat", "MIT"),
        ("Apache License, Version 2.0", "Apache-2.0"),
        ("Apache 2", "Apache-2.0"),
        ("BSD 3-Clause License", "BSD-3-Clause"),
        ("https://opensource.org/licenses/MIT", "MIT"),
        ("https://spdx.org/licenses/OFL-1.1.html", "OFL-1.1"),
        ("GPL-2+", "GPL-2.0-or-later"),
        ("GNU GPL v3 or later", "GPL-3.0-or-later"),
        ("GPL v2 only", "GPL-2.0-only"),
    ],
)
def test_names_of_licences_as_people_write_them_are_understood(stated, spdx):
    assert licences.normal(stated) == spdx


@pytest.mark.parametrize(
    ("stated", "candidates"),
    [
        ("GPL-2", "GPL-2.0-only or GPL-2.0-or-later"),
        ("GPLv3", "GPL-3.0-only or GPL-3.0-or-later"),
        ("GNU General Public License v2.0", "GPL-2.0-only or GPL-2.0-or-later"),
        ("LGPL 2.1", "LGPL-2.1-only or LGPL-2.1-or-later"),
        ("CC BY-SA", "CC-BY-SA-4.0 or CC-BY-SA-3.0 or CC-BY-SA-2.0"),
    ],
)
def test_an_ambiguous_name_is_refused_with_its_candidates(stated, candidates):
    assert licences.normal(stated) is None
    assert licences.explain(stated) == (
        f"its licence {stated!r} may be {candidates}; write which one"
    )


def test_other_refusals_say_what_would_be_right():
    assert "is not an SPDX expression, such as CC-BY-4.0" in licences.explain("free to use")
    assert "neither the record nor its source states a licence" in licences.explain(" ")
    assert len(licences.explain("x" * 10_000)) < 200


@pytest.mark.parametrize(
    ("expression", "missing"),
    [
        ("CC-BY-NC-4.0", ("CC-BY-NC-4.0",)),
        ("MIT AND GPL-3.0-only AND CC-BY-NC-4.0", ("GPL-3.0-only", "CC-BY-NC-4.0")),
        ("GPL-3.0-only OR CC-BY-NC-4.0", ("GPL-3.0-only",)),
        ("LicenseRef-Public-Domain", ("LicenseRef-Public-Domain",)),
        ("MIT", ()),
    ],
)
def test_the_licences_that_a_list_lacks_are_named(expression, missing):
    accepted = ("MIT",)
    assert licences.missing(accepted, expression) == missing
    assert licences.allows((*accepted, *missing), expression)


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
