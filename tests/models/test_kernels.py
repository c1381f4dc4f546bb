"""The fast kernels compute what the plain ones do, and leave the switches as they found them."""

import contextlib
import threading

import pytest
import torch
import torch.nn.functional as F

from fedllm.core.switches import ONEDNN, on
from fedllm.models import kernels
from fedllm.models.kernels import fast, frozen_head_loss, onednn_helps
from fedllm.spaces.twice import twice


def test_frozen_head_loss_equals_cross_entropy_and_its_gradient():
    g = torch.Generator().manual_seed(0)
    h = torch.randn(37, 12, generator=g, dtype=torch.float64)
    w, b = torch.randn(50, 12, generator=g, dtype=torch.float64), torch.randn(50, generator=g, dtype=torch.float64)
    y, weight = torch.randint(50, (37,), generator=g), torch.rand(37, generator=g, dtype=torch.float64)
    for chunk, words in ((5, 50), (37, 7), (1000, None), (10, 1)):
        for bias in (None, b):
            a, c = h.clone().requires_grad_(), h.clone().requires_grad_()
            ours, plain = (
                frozen_head_loss(a, w, bias, y, chunk, words),
                F.cross_entropy(F.linear(c, w, bias), y, reduction="none"),
            )
            assert torch.allclose(ours, plain, atol=1e-12)
            (ours * weight).sum().backward()
            (plain * weight).sum().backward()
            assert torch.allclose(a.grad, c.grad, atol=1e-12)


def test_frozen_head_loss_survives_huge_logits_and_no_rows():
    h = torch.full((2, 4), 1e4)
    loss = frozen_head_loss(h, torch.eye(6, 4), None, torch.tensor([5, 0]))
    assert torch.isfinite(loss).all()
    assert frozen_head_loss(torch.zeros(0, 4), torch.eye(6, 4), None, torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_switches_are_put_back_even_after_an_error():
    before = torch.backends.mkldnn.matmul.fp32_precision
    try:
        with fast(torch.device("cpu"), 16):
            if onednn_helps():
                assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
            raise KeyError
    except KeyError:
        pass
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.parametrize("rounds", ["all products", "large products", "batched products"])
def test_the_self_check_refuses_a_machine_that_rounds_to_bf16(monkeypatch, rounds):
    """With Intel's AMX it is the large and the batched ones alone."""
    plain, batched = torch.Tensor.__matmul__, torch.bmm

    def matmul(a, b):
        narrow = rounds == "all products" or (rounds == "large products" and len(a) >= 1024)
        return plain(a.bfloat16(), b.bfloat16()).float() if narrow and a.dtype == torch.float32 else plain(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", matmul)
    if rounds == "batched products":
        monkeypatch.setattr(torch, "bmm", lambda a, b: batched(a.bfloat16(), b.bfloat16()).float())
    assert kernels.onednn_is_fp32.__wrapped__() is False


def test_the_self_check_accepts_fp32():
    before = torch.backends.mkldnn.matmul.fp32_precision
    with on(ONEDNN) if kernels.onednn_is_fp32() else contextlib.nullcontext():
        assert kernels._error(torch.Generator().manual_seed(1), 300, 70, 50) <= 1e-5
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_a_thread_turns_no_switch_for_another():
    """Short rows in one, long ones in the other: what either computes under never changes while it computes, and after
    threads that leave in another order than they came all is as before."""
    def flash():
        return torch.backends.cuda.flash_sdp_enabled()

    assert flash()
    seen, errors = {8: set(), 1000: set()}, []
    ready = threading.Barrier(4)

    def work(length):
        try:
            ready.wait(60)
            for _ in range(100):
                with fast(torch.device("cpu"), length):
                    seen[length].add(flash())
                    for _ in range(20):
                        torch.ones(8, 8) @ torch.ones(8, 8)
                    seen[length].add(flash())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=[n], daemon=True) for n in (8, 1000, 8, 1000)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert not errors and not any(t.is_alive() for t in threads)
    assert seen == {8: {False}, 1000: {True}} and flash()


def test_who_leaves_out_of_turn_leaves_no_switch_on():
    cpu, steps = torch.device("cpu"), [threading.Event() for _ in range(3)]
    other = []

    def second():
        steps[0].wait(60)
        with fast(cpu, 8):
            steps[1].set()
            steps[2].wait(60)
            other.append(torch.backends.cuda.flash_sdp_enabled())

    thread = threading.Thread(target=second, daemon=True)
    thread.start()
    with fast(cpu, 8):
        steps[0].set()
        assert steps[1].wait(60)
    steps[2].set()
    thread.join(60)
    assert other == [False] and torch.backends.cuda.flash_sdp_enabled()


def test_a_switch_inside_another_and_back():
    cpu, flash = torch.device("cpu"), torch.backends.cuda.flash_sdp_enabled
    with fast(cpu, 1000):
        with twice():
            assert not flash()
            with fast(cpu, 1000):
                assert not flash()
        assert flash()
    with pytest.raises(KeyError), fast(cpu, 8):
        raise KeyError
    assert flash()
