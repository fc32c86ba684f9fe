"""The table of what it works with is that of the tests."""

import re
from importlib.metadata import metadata, requires

import pytest

from tests.compatibility import AREAS, DOCUMENT, LICENSES, USERS, document, rows


def test_the_document_is_up_to_date():
    assert DOCUMENT.read_text() == document(), "run: python -m tests.compatibility"


def test_every_area_has_a_row_and_every_row_a_status():
    assert {row.area for row in rows()} == set(AREAS)
    assert {row.status for row in rows()} == {"supported", "refused"}


def test_every_package_that_users_install_has_its_license_listed():
    wanted = set()
    for line in requires("alpha-optim"):
        extra = re.search(r'extra == "([^"]+)"', line)
        if extra is None or extra[1] in USERS:
            wanted.add(re.match(r"[\w-]+", line)[0])
    assert wanted == set(LICENSES)


@pytest.mark.parametrize("package", LICENSES)
def test_the_license_is_the_one_the_package_says_it_has(package):
    said = metadata(package)
    fields = [said.get("License-Expression"), said.get("License"), *(said.get_all("Classifier") or ())]
    short = {"BSD-3-Clause": "BSD", "PSF": "Python Software Foundation", "Apache-2.0": "Apache"}
    name = short.get(LICENSES[package], LICENSES[package])
    assert any(name in field for field in fields if field), fields
