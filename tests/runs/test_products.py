"""What a run leaves can be written, however its memory holds it."""

import torch
from safetensors.torch import load_file

from fedllm.runs.folder import RunFolder
from fedllm.runs.products import write_clients
from tests.methods.conftest import begin


def test_a_memory_that_holds_one_tensor_under_two_names_is_written_whole(tmp_path):
    step = torch.arange(6.0)
    kept = {"tried": {"inner": step, "last": step[4:]}, "next": {"inner": step, "turned": step.view(2, 3).T}, "n": 3}
    folder = RunFolder.create(tmp_path / "run", {"name": "run"})
    model = begin("fedavg").world.model
    assert write_clients(folder, lambda c: model, {"a": kept, "b": {}}) == 1
    found = load_file(folder.path / "clients" / "a" / "memory.safetensors")
    assert {n: t.tolist() for n, t in found.items()} == {
        "tried/inner": step.tolist(), "tried/last": [4, 5], "next/inner": step.tolist(),
        "next/turned": [[0, 3], [1, 4], [2, 5]]}
