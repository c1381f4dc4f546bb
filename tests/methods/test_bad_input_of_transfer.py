"""What knowledge that travels without weights may lack: an error says so, nothing hangs, nothing leaves.

No public rows, a teacher that does not answer, tokenizers without common text, a writer that repeats itself, no gate:
each is tried with every method that it could happen to, and those are found by what they ask for.
"""

from __future__ import annotations

import inspect
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedllm.core.client import SERVER, Profile
from fedllm.core.errors import CompositionError, FedLLMError
from fedllm.core.method import Method
from fedllm.engines.far.reasons import Refused
from fedllm.federation.gated import gated
from fedllm.gate.verdict import spoken
from fedllm.methods.registry import METHODS, make_method, method_class
from fedllm.models.endpoint import Completion, Endpoint
from fedllm.models.model import Model
from fedllm.models.shelf import Shelf
from fedllm.privacy.responsible_gate import ResponsibleGate
from fedllm.runs.build import need_public
from fedllm.spaces import make_space
from tests.methods.conftest import begin, llama, named, tokenizer, tried
from tests.methods.test_crosslm import Slow, serving  # noqa: F401

PUBLIC = {
    "creamfl": {}, "dp_offsite_peft": {"prealign_steps": 2}, "fedbiot": {"prealign_steps": 2}, "fedcollm": {},
    "fedmd": {}, "fedmkt": {}, "fedpeat": {"prealign_steps": 2}, "ffm_lifecycle": {}, "flex_olmo": {},
    "llm_synth_pretrain": {"warm_steps": 1}, "mllm_fl": {}, "multi_fm_kd": {}, "offsite_tuning": {"prealign_steps": 2},
    "fedagent_rlkd": {}, "fusionai": {}, "public_dp_distill": {},
    "shapley": {}, "swarm_search": {}, "sycophancy_synth": {"n": 2},
}
"""Methods that need public rows, and the knobs with which their trial does too."""
WRITTEN = {
    "crosslm": {"least_new": 0.5}, "fdkt": {"least_new": 0.5}, "fedcot": {"max_new_tokens": 4},
    "llm_synth_classify": {"generator": "writer", "n_per_label": 2, "embed": "tfidf"},
    "llm_synth_pretrain": {"warm_steps": 1, "n_synth": 4, "generated": 1.0, "filtered": 0.0, "transformed": 0.0},
    "fedpit": {"synthetic_ratio": 1.0, "beta": 1.0}, "self_instruct_local": {"target": 1.0, "max_attempts": 2},
    "synth_warmstart": {"warm_steps": 1, "n_syn": 8, "generator_steps": 1},
}
"""Methods for which a model writes, and the knobs with which it does."""
ASKED = {"crosslm": {"reinforce": False}, "fdkt": {"least_new": 0.0}, "fedcot": {"epsilon": None}, "fedcollm": {},
         "mllm_fl": {}, "multi_fm_kd": {}, "llm_synth_classify": WRITTEN["llm_synth_classify"],
         "public_dp_distill": {"teacher": "teacher", "mu": 0.5},
         "llm_synth_pretrain": {**WRITTEN["llm_synth_pretrain"], "generator": "writer"}}
"""Methods whose server asks a model by name, which might be an endpoint."""


def begun(name, **knobs):
    return begin(name, engine="in_process", **{**tried(name), **knobs})


def test_whoever_needs_public_rows_stands_in_the_list():
    """A new method that does is tried here too, or this says so."""
    needs = {n for n in METHODS for made in (default(n),) if made is not None and made.public_at()}
    assert {n for n in needs if not method_class(n).trial.apart} == set(PUBLIC)


def default(name):
    try:
        return make_method(name)
    except FedLLMError:  # it has knobs that must be said
        return None


@pytest.mark.parametrize("name", PUBLIC)
def test_without_public_rows_a_run_is_refused(name):
    knobs = {**tried(name), **PUBLIC[name]}
    made = make_method(name, **{k: v for k, v in knobs.items() if k in method_class(name).knobs()})
    with pytest.raises(CompositionError, match=f"method '{name}' works on public rows at the (clients|server)"):
        need_public(SimpleNamespace(method=SimpleNamespace(name=name)), made, 0)


def test_whoever_reads_public_rows_says_so():
    """Or a run without would find out in the middle of a round."""
    for name in METHODS:
        kind = method_class(name)
        ours = {inspect.getsourcefile(k) for k in kind.__mro__ if k.__module__.startswith("fedllm.methods.")}
        if any("client.public" in Path(file).read_text() for file in ours):
            assert kind.public_at is not Method.public_at, name


def test_whose_server_asks_a_model_stands_in_the_list():
    found = {n for n in METHODS if not method_class(n).trial.apart and default(n) is not None and (
        default(n).server_asks_for() or default(n).asks_for())}
    assert found - {"fedlogic"} <= set(ASKED)


@pytest.mark.parametrize("name", ASKED)
def test_a_model_that_does_not_answer_ends_the_run_in_time(name, serving):  # noqa: F811
    run = begun(name, **ASKED[name])
    silent, asked = serving(Slow), run.method.server_asks_for() or run.method.asks_for()
    mine = {n: run.world.models[n] for n in run.world.models if n not in asked}
    run.world.models = Shelf({**{n: lambda m=m: m for n, m in mine.items()}, **dict.fromkeys(asked, lambda: Endpoint(
        silent, timeout=0.2, retries=0, backoff=0.0))})
    began = time.monotonic()
    with pytest.raises(FedLLMError) as found:
        run.go(2)
    said = str(found.value)
    assert "no answer within 0.2 s" in said or "models." in said or "endpoint" in said, said
    assert time.monotonic() - began < 30
    heard = [e for e in run.engine.record.events if e["kind"] == "wire" and e["direction"] == "up" and e["round"]]
    assert not heard or name == "fdkt"  # whose first round is that of the generators alone


def test_tokenizers_without_common_text_end_the_round_before_anything_leaves():
    """One client's tokens are words that the server's tokenizer never writes."""
    run = begun("fedmkt")
    names = tokenizer()
    own = Model(llama(), type("Odd", (), {
        "all_special_tokens": [], "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 1, "__len__": lambda self: 64,
        "__call__": lambda self, *a, **k: names(*a, **k), "__getattr__": lambda self, n: getattr(names, n),
        "convert_ids_to_tokens": lambda self, ids: [f"Ġ{chr(0x4e00 + i)}" for i in ids]})(), "generation",
        make_space("lora", rank=4), fast_kernels=False)
    run.world.held = Shelf({"odd": lambda: own})
    run.world.profiles = {"c1": Profile(model="odd")}
    run.engine.infos["c1"] = type(run.engine.infos["c1"])("c1", 7, Profile(model="odd"))
    with pytest.raises(CompositionError, match=r"client 'c1': its tokenizer and the server's have no text in common"):
        run.go(1)
    assert not [e for e in run.engine.record.events if e["kind"] == "wire" and e["client"] == "c1"
                and e["direction"] == "up"]


PARROT = "Instruction: say well\nResponse: well\n\n"


@pytest.mark.parametrize("name", WRITTEN)
def test_of_a_writer_that_repeats_itself_nothing_leaves(name, monkeypatch):
    """It says the same row whatever it is asked: no client sends it, and none is told it by the server."""
    monkeypatch.setattr("fedllm.engines.client.ClientCall.generate", lambda self, prompts, *a, **k: [PARROT] * len(
        prompts))
    monkeypatch.setattr("fedllm.engines.holder.Holder.complete", lambda self, prompts, *a, **k: [
        Completion(PARROT, -1.0, 1, 1) for _ in prompts])
    knobs = dict(WRITTEN[name])
    run = begun(name, **knobs)
    if "writer" in knobs.values():
        run.world.models = Shelf({"writer": lambda: named("writer", run.method, run.world.model.words.dtype)})
    crossed, cross = [], run.engine.cross

    def look(way, job, payload):
        crossed.extend(t for _, _, t in spoken(payload) if job.client != SERVER)
        return cross(way, job, payload)

    run.engine.cross = look
    try:
        run.go(2)
    except FedLLMError as error:
        said = ("repeats itself", "wrote nothing", "no text of", "no synthetic row")
        assert any(words in str(error) for words in said), error
    else:
        assert name in ("self_instruct_local", "fedpit", "fdkt"), "somebody should have said so"
    assert not [t for t in crossed if "well" in t]
    assert not [e for e in run.engine.record.events if e["kind"] == "missing" and e["client"] != SERVER
                and "well" in e["why"]]  # nor in the reason why there is none


@pytest.mark.parametrize("name", [n for n in METHODS if "text" in method_class(n).card.kinds])
def test_a_site_takes_no_part_where_text_would_leave_and_no_gate_is_listed(name):
    kind = method_class(name)
    speaks = object.__new__(kind)
    with pytest.raises(Refused, match=f"method '{name}' sends text; the run must list responsible_gate"):
        gated(speaks, [], {}, None)
    [layer] = gated(speaks, [ResponsibleGate(encoder="off")], {"copies": "withhold"}, None)
    assert layer.copies == "withhold"
