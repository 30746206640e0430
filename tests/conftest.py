from __future__ import annotations

from hypothesis import settings

# How long one example takes is no property of the code: the first compiles its patterns, and the machine may be busy.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")
