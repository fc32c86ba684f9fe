"""A short run of what `python -m tests.trust` does for 5,000 steps."""

import pytest

from tests.trust.growth import grown


@pytest.mark.parametrize(("optimizer", "steered"), [("SGD", False), ("AdamW", False), ("AdamW", True)])
def test_nothing_but_the_history_grows(optimizer, steered):
    assert grown(2000, optimizer, steered) == {}
