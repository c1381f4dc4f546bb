"""Counted operations against torch's own counter, and what the machine's counters say."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, AutoModelForCausalLM

from evidence.rigs.energy import IN_PLACE, energy_flops
from fedllm.data.encode import Encoded
from fedllm.local import power
from fedllm.local.fit import run_fits
from fedllm.local.flops import FORWARD, cost_of, steps_of, work_of
from fedllm.local.forward import run_losses
from fedllm.local.requests import Fit, Generate, Limits, Losses, Probe, Sensitivity
from fedllm.local.spec import LocalSpec
from fedllm.models.model import HeadedEncoder, Model
from fedllm.spaces import make_space


def llama(folder, space, **knobs):
    return Model(AutoModelForCausalLM.from_pretrained(folder), None, "generation", make_space(space, **knobs))


def rows(*lengths):
    import numpy as np

    out = []
    for n in lengths:
        ids = np.arange(5, 5 + n, dtype=np.int32)
        labels = ids.astype(np.int64)
        labels[0] = -100
        out.append(Encoded(ids, labels, n - 1))
    return out


def counted(work, request):
    work([request], Limits())
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        work([request], Limits())
    return counter.get_total_flops()


def test_full_lora_and_forward_are_torchs_count():
    got = energy_flops("edge_energy", 0)
    assert got["full"] < 1e-9 and got["forward"] < 1e-9 and got["lora"] < 0.1


@pytest.mark.parametrize("space", ["adapter", "soft_prompt", "prefix", "ia3", "head", "layers"])
def test_other_spaces_are_near_torchs_count(tiny_llama_folder, space):
    model = llama(tiny_llama_folder, space, **({"length": 4} if space in ("soft_prompt", "prefix") else {}))
    fit = Fit("c", model, model.initial(), None, rows(12, 12), [range(2)], LocalSpec(optimizer="sgd", lr=0.1))
    assert work_of(fit).flops == pytest.approx(counted(run_fits, fit), rel=0.25)
    ask = Losses("c", model, model.initial(), None, rows(12, 12))
    assert work_of(ask).flops == pytest.approx(counted(run_losses, ask), rel=0.15)


def test_classifiers_too(tiny_bert_folder):
    body = AutoModel.from_pretrained(tiny_bert_folder, attn_implementation="eager")
    body.pooler = None
    model = Model(HeadedEncoder(body, 3, "mean"), None, "classification", make_space("lora", targets=("query",)))
    mine = [Encoded(e.ids, 1, 1) for e in rows(10, 10)]
    fit = Fit("c", model, model.initial(), None, mine, [range(2)], LocalSpec(optimizer="sgd", lr=0.1))
    assert work_of(fit).flops == pytest.approx(counted(run_fits, fit), rel=0.1)


def test_six_four_and_two_operations_a_weight_and_token(tiny_llama_folder):
    full, lora = (llama(tiny_llama_folder, s) for s in ("full", "lora"))
    weights = sum(p.numel() for n, p in full.net.named_parameters() if p.dim() == 2 and "embed" not in n
                  and "lm_head" not in n)
    cost = cost_of(full, full.initial())
    assert cost.body == 6 * weights and cost.body_forward == 2 * weights
    base = cost_of(lora, lora.initial())
    factors = sum(t.numel() for t in lora.initial().values())
    assert 0.9 * (4 * weights + 6 * factors) <= base.body <= 4 * weights + 6 * factors


def test_tokens_and_steps_of_every_kind_of_request(tiny_llama_folder):
    model = llama(tiny_llama_folder, "lora")
    theta, mine = model.initial(), rows(4, 6, 9)
    fit = Fit("c", model, theta, None, mine, [[0, 2], [1]], LocalSpec())
    assert work_of(fit).tokens == 19 and steps_of(fit, 2) == 2
    one, two = Losses("c", model, theta, None, mine), Probe("c", model, theta, None, mine, (theta, theta))
    assert (work_of(one).tokens, work_of(two).tokens) == (19, 38) and work_of(two).flops == 2 * work_of(one).flops
    assert (steps_of(one, 2), steps_of(two, 2)) == (1.5 * FORWARD, 3 * FORWARD)
    assert work_of(Sensitivity("c", model, theta, None, mine)).flops == work_of(
        Fit("c", model, theta, None, mine, [[0, 1, 2]], LocalSpec())).flops
    said = Generate("c", model, theta, None, [e.ids for e in mine], 5)
    assert work_of(said).tokens == 19 + 15 and work_of(fit).flops > work_of(one).flops


def package(root, name, now, most):
    (root / name).mkdir(exist_ok=True)
    (root / name / "energy_uj").write_text(f"{now}\n")
    (root / name / "max_energy_range_uj").write_text(f"{most}\n")


def test_packages_are_added_and_a_counter_that_starts_again_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(power, "_nvml", lambda: ({}, "NVML: no library"))
    package(tmp_path, "intel-rapl:0", 9_000_000, 10_000_000)
    package(tmp_path, "intel-rapl:1", 1_000_000, 10_000_000)
    package(tmp_path, "intel-rapl:0:0", 5, 10)  # a part of the first
    before = power.read(tmp_path)
    assert before.joules == {"RAPL intel-rapl:0": 9.0, "RAPL intel-rapl:1": 1.0}
    package(tmp_path, "intel-rapl:0", 2_000_000, 10_000_000)
    package(tmp_path, "intel-rapl:1", 1_500_000, 10_000_000)
    assert power.read(tmp_path).since(before) == pytest.approx(3.5) and "intel-rapl:1" in before.sources


def test_what_cannot_be_read_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(power, "_nvml", lambda: ({}, "NVML: no library"))
    none = power.read(tmp_path / "nowhere")
    assert none.since(none) is None and "lists no processor package; NVML: no library" in none.sources
    package(tmp_path, "intel-rapl:0", "not a number", 10)
    odd = power.read(tmp_path)
    assert not odd.joules and "intel-rapl:0/energy_uj cannot be read" in odd.sources


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a card")
def test_a_machine_without_a_card_says_so():
    joules, why = power._nvml()
    assert joules == {} and why.startswith("NVML: ")
