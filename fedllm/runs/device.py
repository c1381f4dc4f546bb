"""What a model computes on, as recipes and sites' settings write it. Light: a site's watchman reads settings too."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import PlainValidator


def _device(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise ValueError("allowed is auto, cpu, cuda or cuda:N")
    return value


Device = Annotated[str, PlainValidator(_device)]
"""auto (a CUDA card where there is one), cpu, cuda, or cuda:N."""
