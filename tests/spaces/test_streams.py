"""Several spaces on one network: each as if it were alone, none undone by another, personal ones at home."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import fedllm
from fedllm.core.ask import on_client
from fedllm.core.errors import CompositionError, ModelError, RecipeError
from fedllm.core.method import Star
from fedllm.core.payload import pack, part
from fedllm.core.program import drive
from fedllm.core.reduce import Mean
from fedllm.engines import ENGINES
from fedllm.local.flops import cost_of
from fedllm.methods.registry import make_method
from fedllm.models.load import load_model
from fedllm.models.peft_io import load_adapter, save_adapter
from fedllm.runs.products import form_of, write_tree
from fedllm.spaces import make_space
from tests.methods.conftest import begin, gap
from tests.spaces.test_peft_io import logits_of, peft_logits, shaken

WU = {"of": {"sigma": "full", "tau": {"name": "lora", "rank": 2}}, "personal": ["tau"]}
TWO = {"of": {"r": {"name": "lora", "rank": 2}, "s": {"name": "lora", "rank": 3}}}


def streams(folder, task="generation", **knobs):
    labels = ("bad", "good") if task == "classification" else ()
    return load_model(folder, task, make_space("streams", **knobs), labels=labels, dtype="float64")


def plain(folder, name, **knobs):
    return load_model(folder, "generation", make_space(name, **knobs), dtype="float64")


def test_a_low_rank_part_over_full_weights_adds_to_them(tiny_llama_folder):
    model = streams(tiny_llama_folder, **WU)
    theta = shaken(model)
    whole = plain(tiny_llama_folder, "full")
    merged, lora = dict(part(theta, "sigma")), model.space.made["tau"]
    for name in merged:
        a, b = (theta.get(f"tau/base_model.model.{name.removesuffix('.weight')}.lora_{x}.weight") for x in "AB")
        if a is not None:
            merged[name] = merged[name] + lora.scale(2) * (b @ a)
    assert len(merged) == len(whole.initial())
    assert torch.allclose(logits_of(model, theta), logits_of(whole, merged), atol=1e-10)
    assert not torch.allclose(logits_of(model, theta), logits_of(model, pack(sigma=part(theta, "sigma"))), atol=1e-3)


def test_two_low_rank_parts_on_the_same_modules_add_up_and_lanes_stay_apart(tiny_llama_folder):
    model = streams(tiny_llama_folder, **TWO)
    theta = shaken(model)
    r, s, none = (logits_of(model, t) for t in (pack(r=part(theta, "r")), pack(s=part(theta, "s")), {}))
    assert not torch.allclose(r, none, atol=1e-3) and not torch.allclose(s, none, atol=1e-3)
    alone = plain(tiny_llama_folder, "lora", rank=3)
    assert torch.allclose(s, logits_of(alone, part(theta, "s")), atol=1e-10)
    net = plain(tiny_llama_folder, "full")
    fresh = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float64)
    model.space.merge(fresh, theta)
    assert torch.allclose(logits_of(model, theta), logits_of(net, dict(fresh.named_parameters())), atol=1e-6)


@pytest.mark.parametrize(("knobs", "why"), [
    ({"of": {"tau": {"name": "lora", "rank": 2}, "sigma": "full"}},
     r"streams 'tau' and 'sigma' both change the module 'model.layers.0.self_attn.q_proj'.*list last"),
    ({"of": {"a": "head", "b": "full"}}, "streams 'a' and 'b' both change the module 'lm_head'"),
    ({"of": {"a": {"name": "soft_prompt", "length": 2}, "b": {"name": "prefix", "length": 2}}},
     "streams 'a' and 'b' both put virtual tokens"),
])
def test_streams_that_undo_each_other_are_refused(tiny_llama_folder, knobs, why):
    with pytest.raises(ModelError, match=why):
        streams(tiny_llama_folder, **knobs)


def test_of_two_streams_the_first_has_the_classifier(tiny_bert_folder):
    model = streams(tiny_bert_folder, "classification", **WU)
    assert [n for n in model.initial() if "classifier" in n] == ["sigma/classifier.weight", "sigma/classifier.bias"]
    twice = {"sigma": "full", "tau": {"name": "lora", "rank": 2, "modules_to_save": ["classifier"]}}
    with pytest.raises(ModelError, match="streams 'sigma' and 'tau' both change the module 'classifier'"):
        streams(tiny_bert_folder, "classification", of=twice)


@pytest.mark.parametrize(("knobs", "why"), [
    ({}, "Streams.of = None"), ({"of": {"a": "full"}}, "two names or more"),
    ({"of": {"a": "full", "b": 3}}, r"Streams.of.b = 3"), ({"of": {"a/b": "full", "b": "lora"}}, "Streams.of.a/b"),
    ({"of": {"a": "full", "b": "lorra"}}, "did you mean 'lora'"),
    ({"of": {"a": "full", "b": {"name": "lora", "rang": 2}}}, "of.b.rang: unknown key; did you mean 'rank'"),
    ({"of": {"a": "full", "b": {"name": "streams"}}}, "streams do not hold streams"),
    (WU | {"personal": ["t"]}, r"Streams.personal = \['t'\]: 't' is no stream; allowed are sigma, tau"),
    (WU | {"frozen": ["tau"]}, "'tau' is personal too"), (TWO | {"frozen": ["r", "s"]}, "nothing to train")])
def test_bad_streams_are_refused_by_name(knobs, why):
    with pytest.raises(RecipeError, match=why):
        make_space("streams", **{k: tuple(v) if isinstance(v, list) else v for k, v in knobs.items()})


def test_engines_agree():
    for task in ("generation", "classification"):
        for dtype, near in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
            one, other = (begin("fedlora_wu", engine=e, space="streams", space_knobs=WU, dtype=dtype, task=task,
                                local={"steps": 4}).go(2) for e in ("in_process", "vectorized"))
            assert gap(one.state["theta"], other.state["theta"]) < near
            assert other.world.model.stackable
            for c in one.engine.memory:
                assert gap(one.engine.memory[c]["tau"], other.engine.memory[c]["tau"]) < near


def test_each_rests_while_the_other_trains_and_tau_is_in_no_message():
    run = begin("fedlora_wu", space="streams", space_knobs=WU, local={"steps": 4}, personal_share=0.5)
    seen = []
    cross = run.engine.cross
    run.engine.cross = lambda way, job, payload: (seen.append(set(payload)), cross(way, job, payload))[1]
    start = run.state["theta"]
    run.go(2)
    drive(run.method.evaluate(run.state, run.world.infos(), "local"), run.engine)
    assert seen and not [k for keys in seen for k in keys if "lora" in k or "tau" in k]
    assert gap(run.state["theta"], start) > 1e-6 and len({float(m["tau"][next(iter(m["tau"]))].sum())
                                                         for m in run.engine.memory.values()}) == 4


def test_without_tau_it_is_fedavg_to_the_bit():
    one = begin("fedlora_wu", space="streams", space_knobs=WU, dtype=torch.float32, personal_share=0.0,
                weighting="n").go(2)
    other = begin("fedavg", space="full", dtype=torch.float32).go(2)
    assert gap(one.state["theta"], other.state["theta"]) == 0.0


def test_what_each_client_is_tested_with():
    run = begin("fedlora_wu", space="streams", space_knobs=WU, local={"steps": 4}).go(1)
    got = {}
    for use in ("both", "sigma", "tau"):
        method = make_method("fedlora_wu", use=use)
        engine = ENGINES["vectorized"]((method,), run.world)
        engine.memory = run.engine.memory
        got[use] = drive(method.evaluate(run.state, run.world.infos(), "local"), engine)["c1"]["loss"]
    model, memory = run.world.model, run.engine.memory["c1"]["tau"]
    from fedllm.engines.carry import carry_out
    from fedllm.engines.client import ClientCall

    call = ClientCall(run.world.infos()[1], run.world, {}, 0, "x.score", 0,
                      lambda r: carry_out([r], run.world.limits)[0])
    want = {"sigma": pack(sigma=run.state["theta"]), "tau": pack(tau=memory),
            "both": pack(sigma=run.state["theta"], tau=memory)}
    assert got == pytest.approx({u: call.score(t)["loss"] for u, t in want.items()}, abs=1e-10)
    assert len(set(got.values())) == 3 and model.space.personal == ("tau",)


class Careless(Star):
    """Trains both streams and sends what it should not, under the name `key`."""

    key = "delta"

    def init(self, model):
        return {"theta": part(model.initial(), "sigma")}

    @on_client(reduce=Mean())
    def local(self, msg, client):
        tau = part(client.model.initial(), "tau")
        fitted = client.fit(pack(sigma=part(msg, "theta"), tau=tau))
        return pack(n=1, **{self.key: fitted.theta if self.key == "delta" else part(fitted.theta, "tau")})

    def merge(self, state, out):
        return state


@pytest.mark.parametrize("engine", ["in_process", "vectorized"])
@pytest.mark.parametrize("key", ["delta", "innocent"])
def test_a_personal_stream_is_not_put_on_the_wire(engine, key):
    run = begin("fedlora_wu", engine=engine, space="streams", space_knobs=WU)
    method = Careless()
    object.__setattr__(method, "key", key)
    driver = ENGINES[engine]((method,), run.world)
    driver.begin(0)
    with pytest.raises(CompositionError, match=f"stream 'tau' is personal and cannot be put on the wire, where 'local' "
                                               f"puts it under '{key}/"):
        drive(method.round(method.init(run.world.model), run.world.infos()), driver)


def test_nor_does_the_server_send_one():
    with pytest.raises(CompositionError, match=r"'tau' is personal .* under 'theta/tau/"):
        begin("fedavg", space="streams", space_knobs=WU).go(1)


def test_a_frozen_stream_stays_as_it_is_whatever_the_method():
    frozen = TWO | {"frozen": ("r",)}
    run = begin("fedavg", space="streams", space_knobs=frozen)
    start = run.state["theta"]
    run.go(1)
    assert gap(part(run.state["theta"], "r"), part(start, "r")) == 0.0
    assert gap(part(run.state["theta"], "s"), part(start, "s")) > 1e-6


def test_a_method_that_moves_a_frozen_stream_by_other_ways_is_refused(recipe, tmp_path):
    recipe |= {"space": {"name": "streams", "of": TWO["of"], "frozen": ["r"]}, "rounds": 1,
               "method": {"name": "fedmezo", "steps": 1}}
    with pytest.raises(CompositionError, match="stream 'r' is frozen and method 'fedmezo' changed"):
        fedllm.run(recipe, root=tmp_path)


def test_what_is_saved_computes_what_was_trained(tiny_llama_folder, tmp_path):
    model = load_model(tiny_llama_folder, "generation", make_space("streams", **WU))
    start, theta = model.initial(), shaken(model)
    alone = pack(sigma=part(start, "sigma"), tau=part(theta, "tau"))  # sigma makes no difference: PEFT has the rest
    assert form_of(model, alone) == "adapter" and form_of(model, theta) == "model"
    save_adapter(tmp_path / "a", model, alone, tiny_llama_folder)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama_folder), tmp_path / "a")
    assert torch.allclose(logits_of(model, alone), peft_logits(theirs), atol=1e-5)
    again = load_adapter(tmp_path / "a", model)
    assert torch.allclose(logits_of(model, again), logits_of(model, alone), atol=1e-6)
    for name, tree in (("both", theta), ("sigma", pack(sigma=part(theta, "sigma")))):
        write_tree(tmp_path / name, model, tree, None)
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert torch.allclose(logits_of(model, tree), peft_logits(saved), atol=5e-5)  # products of two kernels


def test_the_work_of_streams_is_that_of_their_parts(tiny_llama_folder):
    one = plain(tiny_llama_folder, "lora", rank=3)
    two = streams(tiny_llama_folder, of={"r": {"name": "soft_prompt", "length": 2}, "s": {"name": "lora", "rank": 3}})
    alone, both = cost_of(one, one.initial()), cost_of(two, two.initial())
    assert both.ahead == 2 and both.head == alone.head and both.body_forward == alone.body_forward
    assert both.body == alone.body + 2 * 32 * 32  # the gradient goes on through the first projection to the prompt


def test_a_run_from_recipe_to_model(recipe, tmp_path):
    recipe |= {"space": {"name": "streams", **WU}, "method": "fedlora_wu", "rounds": 2}
    result = fedllm.run(recipe, root=tmp_path)
    assert result.adapter_path.name == "model" and fedllm.plan(recipe).up > 0
    AutoModelForCausalLM.from_pretrained(result.adapter_path)
    folders = sorted((result.folder / "clients").iterdir())
    assert folders and all((f / "tau" / "adapter_config.json").is_file() for f in folders)
    model = load_model(recipe["model"], "generation", make_space("streams", **WU))
    sigma = {n: p.detach() for n, p in AutoModelForCausalLM.from_pretrained(result.adapter_path).named_parameters()}
    tau = {n: t for n, t in load_file(folders[0] / "tau" / "adapter_model.safetensors").items()}
    theirs = AutoPeftModelForCausalLM.from_pretrained(folders[0] / "tau")  # over the served model, not over the first
    assert torch.allclose(logits_of(model, pack(sigma=sigma, tau=tau)), peft_logits(theirs), atol=1e-5)
    assert json.loads((result.folder / "result.json").read_text())["method"] == "fedlora_wu"
    with pytest.raises(CompositionError, match="needs two streams of which tau is personal"):
        fedllm.run(recipe | {"space": "lora"}, root=tmp_path)
