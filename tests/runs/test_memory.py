"""What the process that drives a run holds does not grow with its rounds."""

import gc
import json
import logging
import sys

import pytest
import torch

import fedllm
from fedllm.methods.baselines.fedavg import FedAvg

FROM, TO = 20, 60


@pytest.fixture
def held(monkeypatch):
    """As the first client begins: objects that hold others, tensors, and Python's blocks of memory. A list under `kept`
    is given every reply, as a driver's mistake would keep them."""
    good, found = FedAvg.local, {"kept": None}
    logging.disable(logging.CRITICAL)  # pytest keeps what is logged, where a test before this one lets it be logged

    def local(self, msg, client):
        if client.round in (FROM, TO) and client.round not in found:
            gc.collect()
            alive = gc.get_objects()
            found[client.round] = (len(alive), sum(issubclass(type(x), torch.Tensor) for x in alive),
                                   sys.getallocatedblocks())
        reply = good(self, msg, client)
        if found["kept"] is not None:
            found["kept"].append(dict(reply))
        return reply

    local.__dict__.update(good.__dict__)
    monkeypatch.setattr(FedAvg, "local", local)
    yield found
    logging.disable(logging.NOTSET)


def left(held, model, folder, engine):
    """Objects, tensors and blocks that each round left behind."""
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"say {i}", "response": "red"}) + "\n" for i in range(6)))
    fedllm.run({"name": "r", "model": model, "rounds": TO + 1, "engine": engine, "record": {"checkpoint_every": 20},
                "local": {"steps": 1, "batch_size": 1, "max_length": 16}, "space": {"name": "lora", "rank": 2},
                "data": {"source": str(rows), "partition": {"kind": "iid", "clients": 2}, "test": 0.0},
                "evaluate": {"exact_match": False, "samples": 0, "clients": False}}, root=folder)
    return [(b - a) / (TO - FROM) for a, b in zip(held[FROM], held[TO], strict=True)]


@pytest.mark.parametrize("engine", ["in_process", "vectorized"])
def test_a_round_leaves_nothing_behind(held, tiny_llama_folder, tmp_path, engine):
    objects, tensors, blocks = left(held, tiny_llama_folder, tmp_path, engine)
    assert objects < 1 and tensors < 0.5 and blocks < 50


def test_a_round_that_left_its_replies_behind_would_be_seen(held, tiny_llama_folder, tmp_path):
    held["kept"] = []
    objects, tensors, blocks = left(held, tiny_llama_folder, tmp_path, "in_process")
    assert objects > 1 and tensors > 10 and blocks > 50
