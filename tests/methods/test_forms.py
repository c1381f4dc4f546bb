"""Every client function declares what its replies hold, and honest replies hold just that."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest

import fedllm
from fedllm.core.program import drive
from fedllm.methods import registry
from tests.methods.conftest import tried

METHODS = {name: tried(name) for name in registry.METHODS if not registry.method_class(name).trial.apart}


def functions():
    """Every client function of ours, by `Class.name`."""
    found = {}
    for one in pkgutil.walk_packages(fedllm.__path__, "fedllm."):
        if not one.name.startswith(("fedllm.cli", "fedllm.federation")):
            for _, kind in inspect.getmembers(importlib.import_module(one.name), inspect.isclass):
                if kind.__module__ == one.name:
                    found |= {f"{kind.__name__}.{n}": fn for n, fn in vars(kind).items()
                              if inspect.isfunction(fn) and fn.__dict__.get("runs_on_client")}
    for name in registry.METHODS:
        kind = registry.method_class(name)
        found |= {f"{kind.__name__}.{n}": fn for n, fn in inspect.getmembers(kind, inspect.isfunction)
                  if fn.__dict__.get("runs_on_client")}
    return found


def test_every_client_function_says_what_it_gives():
    found = functions()
    assert len(found) > 80
    silent = [name for name, fn in found.items() if "on_server" not in fn.__dict__ and fn.__dict__["form"] is None]
    assert not silent


@pytest.mark.parametrize("name", METHODS)
def test_honest_replies_are_as_declared(begin, name):
    """Two rounds and a test of each method: no reply is refused."""
    run = begin(name, **{**METHODS[name], "engine": "in_process"})
    seen, plain = [], run.engine.record.emit

    def emit(kind, **facts):
        seen.append((kind, facts))
        return plain(kind, **facts)

    run.engine.record.emit = emit
    run.go(2)
    drive(run.method.evaluate(run.state, run.world.infos(), "local"), run.engine, run.engine.stack[1:])
    assert [facts for kind, facts in seen if kind == "refused"] == []
    assert any(kind == "wire" or "bytes" in facts for kind, facts in seen)
