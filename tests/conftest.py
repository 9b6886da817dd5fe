"""Settings of the whole suite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.report.browser import Browser, browser

# Machines are noisy: how long an example takes is no property of the code.
settings.register_profile("resq", deadline=None)
settings.load_profile("resq")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser that is open for the tests of one module."""
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened
