"""Kernels of our own know one derivative: two are either right, by the plain forms, or refused by torch."""

import importlib
import inspect
import pkgutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fedllm
from fedllm.local.unrolled import replayed
from fedllm.models.encoder import HeadedEncoder
from fedllm.models.model import Model
from fedllm.spaces.registry import make_space
from fedllm.spaces.twice import twice


def ours():
    for info in pkgutil.walk_packages(fedllm.__path__, "fedllm."):
        if info.name.startswith(("fedllm.models.", "fedllm.spaces.", "fedllm.local.")):
            importlib.import_module(info.name)
    return [k for k in torch.autograd.Function.__subclasses__() if k.__module__.startswith("fedllm.")]


def test_each_kernel_of_ours_refuses_a_second_derivative():
    kinds = ours()
    assert len(kinds) >= 6
    assert not [k.__name__ for k in kinds if k.backward.__code__.co_filename == inspect.getsourcefile(k)]


def model(quick):
    torch.manual_seed(0)
    net = LlamaForCausalLM(LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0)).double().eval()
    headed = HeadedEncoder(net.model, 2, "mean").double()
    return Model(headed, None, "classification", make_space("lora", rank=2), labels=("a", "b"), fast_kernels=quick)


@pytest.mark.parametrize("kind", ["quick", "plain"])
def test_a_replays_slope_is_that_of_small_steps(kind):
    made = model(kind == "quick")
    draw = torch.Generator().manual_seed(1)
    theta = {n: t + 0.1 * torch.randn(t.shape, generator=draw, dtype=t.dtype) for n, t in made.initial().items()}
    x = torch.randn(2, 3, 16, generator=draw, dtype=torch.float64)
    y, log_a = torch.randn(2, 2, generator=draw, dtype=torch.float64), torch.tensor(-2.0, dtype=torch.float64)
    way = torch.randn(x.shape, generator=draw, dtype=torch.float64)

    def end(at, graph=False):
        return sum((t ** 2).sum() for t in replayed(made, theta, at, y, log_a, 2, graph=graph).values())

    at = x.clone().requires_grad_()
    slope = float((torch.autograd.grad(end(at, True), at)[0] * way).sum())
    step = 1e-3  # the norm of Llama works in fp32
    assert slope == pytest.approx(float(end(x + step * way) - end(x - step * way)) / (2 * step), rel=2e-2)


def test_outside_it_is_refused():
    made = model(True)
    theta = {n: t.clone().requires_grad_() for n, t in made.initial().items()}
    x, mask = torch.randn(1, 3, 16, dtype=torch.float64), torch.ones(1, 3, dtype=torch.bool)
    with made.using([theta]):
        slopes = torch.autograd.grad(made.outputs(x, mask).sum(), list(theta.values()), create_graph=True,
                                     allow_unused=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum((s ** 2).sum() for s in slopes if s is not None).backward()
    with made.using([theta]), twice():
        slopes = torch.autograd.grad(made.outputs(x, mask).sum(), list(theta.values()), create_graph=True,
                                     allow_unused=True)
    sum((s ** 2).sum() for s in slopes if s is not None).backward()
