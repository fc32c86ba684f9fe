"""The table of what it works with is that of the tests."""

from tests.compatibility import AREAS, DOCUMENT, document, rows


def test_the_document_is_up_to_date():
    assert DOCUMENT.read_text() == document(), "run: python -m tests.compatibility"


def test_every_area_has_a_row_and_every_row_a_status():
    assert {row.area for row in rows()} == set(AREAS)
    assert {row.status for row in rows()} == {"supported", "refused"}
