"""What many tests need."""

from __future__ import annotations

from contextlib import suppress

import pytest

from bon.catalog import SMALLEST, kept_in

with suppress(ImportError):  # an environment for other tests may be without it
    from hypothesis import settings

    settings.register_profile("unhurried", deadline=None)  # a busy machine fails no test
    settings.load_profile("unhurried")


@pytest.fixture(scope="session")
def smollm2() -> str:
    """The name of a real model that is on this machine."""
    if not kept_in(SMALLEST).is_dir():
        pytest.skip("run `bon fetch smollm2-135m`")
    return SMALLEST
