"""Settings of the whole suite."""

from __future__ import annotations

from hypothesis import settings

# Machines are noisy: how long an example takes is no property of the code.
settings.register_profile("resq", deadline=None)
settings.load_profile("resq")
