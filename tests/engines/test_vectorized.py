"""Many clients in one step equal one client at a time: every space, unequal ranks, unequal work, text and classes."""

from dataclasses import dataclass

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from fedllm.core.ask import Ask, on_client
from fedllm.core.client import Profile
from fedllm.core.errors import ClientError, RunError
from fedllm.core.method import Star
from fedllm.core.payload import pack, part
from fedllm.core.program import drive
from fedllm.core.reduce import Mean
from fedllm.data.federation import Federation, Shard
from fedllm.engines import InProcess, Vectorized
from fedllm.engines.carry import RUNNERS
from fedllm.engines.world import World
from fedllm.local.requests import Fit, Limits
from fedllm.local.spec import LocalSpec
from fedllm.local.terms import Linear, Proximal
from fedllm.methods.registry import make_method
from fedllm.models.kernels import onednn_helps
from fedllm.models.model import HeadedEncoder, Model
from fedllm.spaces import make_space
from tests.conftest import PLACE

WORDS = "red green blue one two three cat dog bird say the word is a good bad film of and to yes no"
WORDS = WORDS.split(" ")
SIZES = (9, 14, 3, 1, 22)


def sentence(k, i):
    return " ".join(WORDS[(7 * i + 3 * k + j * (i + 1)) % len(WORDS)] for j in range(2 + (5 * i + k) % 12))


def federation(task):
    def row(k, i):
        text = {"text": sentence(k, i), "label": (i + k) % 3}
        return text if task == "classification" else {"prompt": sentence(k, i), "response": sentence(k + 1, i)[:20]}

    shards = {
        f"c{k}": Shard([row(k, i) for i in range(n)], [row(k, 50 + i) for i in range(3)]) for k, n in enumerate(SIZES)
    }
    return Federation(shards, [row(9, i) for i in range(7)], task, ("x", "y", "z") if task == "classification" else ())


def make_model(folder, task, space, dtype=torch.float64, **options):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if task == "classification":
        body = AutoModel.from_pretrained(folder, dtype=dtype)
        body.pooler = None
        net = HeadedEncoder(body, 3, "mean").to(dtype)
    else:
        net = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return Model(net.to(PLACE), tokenizer, task, space, labels=("x", "y", "z"), **options)


@dataclass(frozen=True)
class Probe(Star):
    """FedAvg that also uses every other kind of request, and starts each client at its own rank."""

    terms: bool = False

    def down(self, state, client):
        return pack(theta=state["theta"]) if client.profile.rank is None else {}

    @on_client()
    def local(self, msg, client):
        theta = part(msg, "theta") or client.model.initial(client.profile.rank)
        noise = {n: 0.1 * t for n, t in theta.items()}
        terms = (Proximal(0.5, theta), Linear(noise)) if self.terms else ()
        fitted = client.fit(theta, terms=terms)
        return pack(theta=fitted.theta, loss=client.loss(fitted.theta), n=client.n) | pack(
            seen=client.score(fitted.theta, on="global")
        )

    def merge(self, state, out):
        return {**state, **{c: dict(reply) for c, reply in out.each.items()}}


def outcome(
    engine,
    folder,
    task,
    space,
    spec,
    *,
    method=None,
    dtype=torch.float64,
    profiles=None,
    rounds=1,
    limits=None,
    **options,
):
    model = make_model(folder, task, space, dtype, **options)
    world = World(
        model, federation(task), spec, seed=3, profiles=profiles or {}, max_new_tokens=4, limits=limits or Limits()
    )
    method = method or Probe()
    run = engine((method,), world)
    state = {"theta": {n: t.to(dtype) for n, t in model.initial().items()}}
    for r in range(rounds):
        run.begin(r)
        state = drive(method.round(state, world.infos()), run)
        run.commit()
    return state


def gap(a, b):
    if isinstance(a, torch.Tensor):
        return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return max(gap(a[k], b[k]) for k in a)
    return abs(a - b)


CAUSAL = [
    ("lora", {}),
    ("lora", {"targets": ["q_proj", "lm_head"]}),
    ("full", {}),
    ("soft_prompt", {"length": 3}),
    ("prefix", {"length": 3}),
    ("ia3", {}),
    ("adapter", {"size": 4}),
    ("st_adapter", {"size": 4, "kernel": (5, 1, 1)}),
    ("layers", {}),
    ("mask", {"density": 0.05}),
    ("head", {}),
]
ADAMW = LocalSpec(lr=1e-2, epochs=1, batch_size=4, clip_norm=0.5)


@pytest.mark.parametrize("name, knobs", CAUSAL, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_generation_in_fp64(tiny_llama_folder, name, knobs):
    a, b = (
        outcome(e, tiny_llama_folder, "generation", make_space(name, **knobs), ADAMW, fast_kernels=False)
        for e in (InProcess, Vectorized)
    )
    assert gap(a, b) < 1e-10


@pytest.mark.parametrize(
    "name", ["lora", "full", "soft_prompt", "ia3", "adapter", "st_adapter", "bias", "layers", "mask", "head"]
)
def test_classification_in_fp64(tiny_bert_folder, name):
    a, b = (outcome(e, tiny_bert_folder, "classification", make_space(name), ADAMW) for e in (InProcess, Vectorized))
    assert gap(a, b) < 1e-10


@pytest.mark.parametrize("name", ["lora", "full", "soft_prompt", "prefix", "ia3", "adapter", "st_adapter"])
def test_fp32_with_sgd_and_fast_kernels(tiny_llama_folder, name):
    spec = LocalSpec(optimizer="sgd", lr=0.05, momentum=0.5, epochs=1, batch_size=4)
    a, b = (
        outcome(e, tiny_llama_folder, "generation", make_space(name), spec, dtype=torch.float32)
        for e in (InProcess, Vectorized)
    )
    assert gap(a, b) < 1e-5


def test_the_backward_pass_multiplies_with_the_forwards_kernels(tiny_llama_folder, monkeypatch):
    seen, plain = [], torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: (
        seen.append(torch.backends.mkldnn.matmul.fp32_precision), plain(self))[1])
    before = torch.backends.mkldnn.matmul.fp32_precision
    outcome(Vectorized, tiny_llama_folder, "generation", make_space("lora"), ADAMW, dtype=torch.float32)
    assert set(seen) == {"bf16" if onednn_helps() and PLACE.type == "cpu" else before}
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_unequal_ranks_are_padded_exactly(tiny_llama_folder):
    ranks = {f"c{k}": Profile(rank=r) for k, r in enumerate((1, 2, 4, 8, 3))}
    for scaling in ("classic", "rslora", "shared"):
        a, b = (
            outcome(
                e,
                tiny_llama_folder,
                "generation",
                make_space("lora", rank=4, scaling=scaling),
                ADAMW,
                profiles=ranks,
                fast_kernels=False,
            )
            for e in (InProcess, Vectorized)
        )
        assert a["c3"]["theta/base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"].shape == (8, 32)
        assert gap(a, b) < 1e-10


def test_terms_schedules_and_fixed_steps(tiny_llama_folder):
    for schedule in ("constant", "cosine"):
        spec = LocalSpec(lr=1e-2, steps=3, batch_size=4, schedule=schedule, weight_decay=0.1)
        a, b = (
            outcome(
                e,
                tiny_llama_folder,
                "generation",
                make_space("lora"),
                spec,
                method=Probe(terms=True),
                fast_kernels=False,
            )
            for e in (InProcess, Vectorized)
        )
        assert gap(a, b) < 1e-10


def test_a_small_token_budget_changes_nothing(tiny_llama_folder):
    a, b = (
        outcome(
            Vectorized, tiny_llama_folder, "generation", make_space("lora"), ADAMW, limits=limits, fast_kernels=False
        )
        for limits in (Limits(), Limits(batch_tokens=70, lane_bytes=1))
    )
    assert gap(a, b) < 1e-10


def test_a_module_without_a_stacked_form_runs_one_lane_at_a_time(tiny_llama_folder):
    from fedllm.spaces import stacked

    forms = list(stacked.FORMS)
    try:
        stacked.FORMS[:] = [f for f in forms if f[1] is not stacked.rms_norm]
        a = outcome(InProcess, tiny_llama_folder, "generation", make_space("full"), ADAMW, fast_kernels=False)
        b = outcome(Vectorized, tiny_llama_folder, "generation", make_space("full"), ADAMW, fast_kernels=False)
    finally:
        stacked.FORMS[:] = forms
    c = outcome(Vectorized, tiny_llama_folder, "generation", make_space("full"), ADAMW, fast_kernels=False)
    assert gap(a, b) < 1e-10 and gap(b, c) < 1e-10


def test_rounds_are_bitwise_repeatable(tiny_llama_folder):
    a, b = (
        outcome(
            Vectorized,
            tiny_llama_folder,
            "generation",
            make_space("lora"),
            ADAMW,
            method=make_method("fedavg"),
            rounds=2,
            dtype=torch.float32,
        )
        for _ in range(2)
    )
    assert gap(a, b) == 0


@dataclass(frozen=True)
class Breaks(Star):
    """One client's code fails."""

    @on_client(reduce=Mean())
    def local(self, msg, client):
        if client.id == "c2":
            raise RuntimeError("disk on fire")
        return {"n": 1}


@pytest.mark.parametrize("engine", [InProcess, Vectorized])
def test_an_error_names_the_client_and_the_phase(tiny_llama_folder, engine):
    with pytest.raises(ClientError, match=r"client 'c2' failed in Breaks.local of round 0: RuntimeError: disk on fire"):
        outcome(engine, tiny_llama_folder, "generation", make_space("lora"), ADAMW, method=Breaks())


@pytest.mark.parametrize("engine", [InProcess, Vectorized])
def test_silence_and_lateness_are_recorded(tiny_llama_folder, engine):
    model = make_model(tiny_llama_folder, "generation", make_space("lora"))
    world = World(model, federation("generation"), ADAMW, profiles={"c1": Profile(availability=0.0)})
    run = engine((Probe(),), world)
    theta = model.initial()
    msgs = {c: pack(theta=theta) for c in ("c0", "c1")}
    [out] = run.send([Ask(Probe().local, msgs)])
    assert out.answered == ("c0",) and "not available" in out.missing["c1"]
    with pytest.raises(Exception, match="deadline of 1e-09 s passed"):
        run.send([Ask(Probe().local, msgs, deadline=1e-9)])
    assert any(e["kind"] == "missing" and e["client"] == "c1" for e in run.record.events)


def test_loopback_counts_the_same_bytes_and_gives_the_same_state(tiny_llama_folder):
    model = make_model(tiny_llama_folder, "generation", make_space("lora"))
    method, states, totals = make_method("fedavg"), [], []
    for loopback in (False, True):
        world = World(model, federation("generation"), ADAMW, seed=1)
        run = Vectorized((method,), world, loopback=loopback)
        states.append(drive(method.round({"theta": model.initial()}, world.infos()), run))
        totals.append(run.record.totals())
    assert gap(*states) == 0 and totals[0] == totals[1] and totals[0]["up"] > 0


@pytest.mark.parametrize("engine", [InProcess, Vectorized])
def test_memory_that_runs_out_says_what_to_lower(engine, tiny_llama_folder, monkeypatch):
    def full(requests, limits):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore about it")

    monkeypatch.setitem(RUNNERS, Fit, full)
    with pytest.raises(RunError, match=r"a Fit of \d clients? does not fit into the memory of .*batch_tokens = 77 "
                                       r".*Tried to allocate 2.00 GiB.\)"):
        outcome(engine, tiny_llama_folder, "generation", make_space("lora"), ADAMW, limits=Limits(batch_tokens=77))
