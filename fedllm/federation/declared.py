"""What a site may say of itself: it leaves the site, so it is numbers and single words."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import AfterValidator

from fedllm.core.shares import SHARES

PROFILE = ("rank", "memory_bytes", "bandwidth", "speed", "availability", "latency", "dropout", "device", "link",
           "modality", "privacy", "shares", "domain")
"""What `core.client.Profile` has; which model a site holds its `model` says."""
WORD = re.compile(r"[A-Za-z0-9_.-]{1,40}")


def _declared(values: dict[str, Any]) -> dict[str, Any]:
    """What a site declares leaves it: known names, numbers, and single words."""
    for key, value in values.items():
        if key not in PROFILE:
            raise ValueError(f"profile.{key} is unknown; allowed are {', '.join(PROFILE)}")
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
        if not (value is None or number or (isinstance(value, str) and WORD.fullmatch(value))):
            raise ValueError(f"profile.{key} = {value!r}: it leaves this site; allowed is a number from 0, or a word")
    if values.get("shares") not in (None, *SHARES):
        raise ValueError(f"profile.shares = {values['shares']!r} is not allowed; it must be one of {list(SHARES)}")
    return values


Declared = Annotated[dict[str, Any], AfterValidator(_declared)]
