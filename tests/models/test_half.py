"""Half precision: what rounding does to the plain network is allowed, and another function is not."""

import pytest
import torch

from evidence.zoo.cell import KNOBS
from evidence.zoo.configs import tiny
from fedllm.core.errors import ModelError
from fedllm.models.exam import NEAR, ROUGH, Exam
from fedllm.models.model import Model
from fedllm.models.proof import examine
from fedllm.models.ways import Ways
from fedllm.spaces import make_space
from fedllm.spaces.space import patch


def half(name="llama", space="lora", dtype=torch.bfloat16):
    made = make_space(space, **KNOBS.get(("", space), {}))
    return Model(tiny(name, dtype=torch.float32).to(dtype), None, "generation", made, name=name)


@pytest.mark.parametrize("name, space", [("llama", "lora"), ("llama", "full"), ("llama", "soft_prompt"),
                                         ("gpt2", "lora"), ("qwen3", "lora")])
def test_a_right_model_is_right_in_bf16_in_every_quick_way(name, space):
    m = half(name, space)
    examine(m, cache=False)
    assert m.ways == Ways() and m.said == []


@pytest.mark.parametrize("path, gain", [("model.layers.0.input_layernorm", 1.15), ("model.norm", 1.2)])
def test_another_function_is_refused_in_bf16_though_it_lies_within_the_old_bound(monkeypatch, path, gain):
    space = type(half().space)
    install = space.install

    def scaled(self, net, stack):
        out = install(self, net, stack)
        patch(net.get_submodule(path), lambda f: lambda x: f(x) * gain)
        return out

    monkeypatch.setattr(space, "install", scaled)
    with pytest.raises(ModelError, match="does not do what it does in transformers"):
        examine(half(), cache=False)
    exam = Exam.of(m := half())
    exam.slack = ROUGH
    assert not exam.differs(m)


def test_the_bound_follows_from_rounding_and_is_never_wider_than_before(monkeypatch):
    assert Exam.of(half(dtype=torch.float32)).slack == NEAR[torch.float32]
    exam = Exam.of(half())
    assert all(a < b for a, b in zip(exam.slack, ROUGH, strict=True))
    assert all(p.dtype == torch.bfloat16 for p in exam.plain.net.parameters())  # what is widened is a copy
    monkeypatch.setattr("fedllm.models.exam.psutil.virtual_memory", lambda: type("M", (), {"available": 0}))
    assert exam.rounding() == ROUGH
