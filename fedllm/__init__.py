"""Federated large language models: one recipe a run, one short file a method, one adapter at the end.

    import fedllm
    result = fedllm.run("recipes/demo.yaml", rounds=3)
    result.evaluation["global"], result.adapter_path

What is listed in `__all__` is what users may rely on; everything heavy is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from fedllm.core.errors import (
    ClientError,
    CompositionError,
    DataError,
    EndpointError,
    FedLLMError,
    ModelError,
    PayloadError,
    QuorumError,
    RecipeError,
    RunError,
)
from fedllm.core.version import VERSION

if TYPE_CHECKING:
    from fedllm.api import ask, resume, run
    from fedllm.comparisons.compare import compare
    from fedllm.comparisons.told import Comparison
    from fedllm.core.ask import Ask, Replies, on_client
    from fedllm.core.card import Card, Claim, Trial
    from fedllm.core.client import Client, ClientInfo, Profile
    from fedllm.core.knobs import knob
    from fedllm.core.layer import Layer
    from fedllm.core.method import Method, Star
    from fedllm.core.program import drive
    from fedllm.core.reduce import Mean, Reducer, Sum
    from fedllm.data.federation import Federation, Shard
    from fedllm.data.load import load_federation
    from fedllm.runs.asking import Answered
    from fedllm.runs.export import export
    from fedllm.runs.plan import Plan, plan
    from fedllm.runs.recipe import Recipe
    from fedllm.runs.replay import replay
    from fedllm.runs.result import Result
    from fedllm.runs.without import remove

__version__ = VERSION

_HOMES = {
    "ask": "api", "Answered": "runs.asking",
    "compare": "comparisons.compare", "Comparison": "comparisons.told",
    "run": "api", "resume": "api", "plan": "runs.plan", "Plan": "runs.plan", "replay": "runs.replay",
    "remove": "runs.without",
    "export": "runs.export", "Recipe": "runs.recipe", "Result": "runs.result",
    "Ask": "core.ask", "Replies": "core.ask", "on_client": "core.ask",
    "Client": "core.client", "ClientInfo": "core.client", "Profile": "core.client", "Layer": "core.layer",
    "Card": "core.method", "Claim": "core.method", "Method": "core.method", "Star": "core.method",
    "Trial": "core.method",
    "knob": "core.method",
    "drive": "core.program", "Mean": "core.reduce", "Reducer": "core.reduce", "Sum": "core.reduce",
    "Federation": "data.federation", "Shard": "data.federation", "load_federation": "data.load",
}

__all__ = [
    "Answered", "Ask", "Card", "Claim", "Client", "ClientError", "ClientInfo", "Comparison", "CompositionError",
    "DataError",
    "EndpointError", "FedLLMError", "Federation", "Layer", "Mean", "Method", "ModelError", "PayloadError", "Plan",
    "Profile", "QuorumError", "Recipe", "RecipeError", "Reducer", "Replies", "Result", "RunError", "Shard", "Star",
    "Sum", "Trial", "ask", "compare", "drive", "export", "knob", "load_federation", "on_client", "plan", "remove",
    "replay", "resume", "run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fedllm' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fedllm.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
