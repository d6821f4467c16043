"""What many tests need."""

from __future__ import annotations

import pytest

from bon.catalog import SMALLEST, kept_in


@pytest.fixture(scope="session")
def smollm2() -> str:
    """The name of a real model that is on this machine."""
    if not kept_in(SMALLEST).is_dir():
        pytest.skip("run `bon fetch smollm2-135m`")
    return SMALLEST
