"""Engines answer what methods ask: in_process is the reference, vectorized serves many clients in one step."""

from fedllm.engines.in_process import InProcess
from fedllm.engines.vectorized import Vectorized

ENGINES = {"in_process": InProcess, "vectorized": Vectorized}

__all__ = ["ENGINES", "InProcess", "Vectorized"]
