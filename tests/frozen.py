"""Imported last into the server that ranks are forked from: what it has imported is no garbage.

DeepSpeed collects it for each engine that it builds: half a second each time, with all that torch holds to visit.
"""

from __future__ import annotations

import gc

gc.collect()
gc.freeze()
