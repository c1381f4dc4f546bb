"""A site holds to its own settings whatever a coordinator sends: layers, budgets, rounds, work, fields, endpoints."""

import dataclasses
import json

import pytest
import torch

from fedllm.core.client import Profile
from fedllm.core.errors import FedLLMError, RecipeError
from fedllm.core.payload import pack
from fedllm.engines.far.leaving import Words
from fedllm.engines.far.reasons import REASONS
from fedllm.engines.far.site import SiteHost
from fedllm.engines.far.sites import PROTOCOL
from fedllm.federation.declared import PROFILE
from fedllm.federation.ledger import SiteLedger
from fedllm.federation.opening import for_sites
from fedllm.federation.settings import SiteSettings
from fedllm.federation.site import open_run
from fedllm.methods.registry import method_class, modules
from fedllm.privacy.accountant import Release
from fedllm.runs.build import make_layers
from fedllm.runs.recipe import load_recipe
from fedllm.runs.resolved import versions
from fedllm.wire import codec

SITES = ("site-a", "site-b", "site-c")
CLEAN = {"optimizer": "sgd", "lr": 0.1, "steps": 2, "batch_size": 4}


class Asker:
    """A coordinator that says what it likes to one site; the site is `open_run` over the codec's bytes and JSON."""

    def __init__(self, folder, model, recipe=None, **settings):
        self.folder, self.model, self.visit = folder, model, 0
        rows = folder / "rows.jsonl"
        if not rows.exists():
            rows.write_text("".join(json.dumps({"prompt": f"say the word {i}", "response": "red"}) + "\n"
                                    for i in range(12)))
        self.settings = SiteSettings(**{"data": str(rows), "store": str(folder / "store"), "models": [model],
                                        **settings})
        self.host = SiteHost(lambda head: open_run(head, "site-a", self.settings))
        self.recipe = load_recipe({"model": model, "space": {"name": "lora", "rank": 2}, "rounds": 2, "local": CLEAN,
                                   "evaluate": {"exact_match": False, "samples": 0}, **(recipe or {}),
                                   "data": {"source": str(rows), "test": 0.0, **(recipe or {}).get("data", {})}})
        names = [type(layer).__name__ for layer in make_layers(self.recipe)[0]]
        self.stack = [method_class(self.recipe.method.name).__name__, *names]

    def open(self, run="r1", **changed):
        raw = for_sites(self.recipe)
        for section, values in changed.items():
            raw[section] = {**raw[section], **values} if isinstance(values, dict) else values
        return self.said({"op": "open", "run": run, "at": 0, "incarnation": f"i{run}{changed}", "recipe": raw,
                          "versions": versions(), "sites": list(SITES)})

    def said(self, head, body=b""):
        said, data = self.host.answer(json.loads(json.dumps({"protocol": PROTOCOL, **head})), bytes(body))
        return json.loads(json.dumps(said)) | ({"reply": codec.decode(data)} if data else {})

    def ask(self, phase="local", round=0, stack=None, visit=None, told=None, attempt="a0"):
        self.visit = visit or self.visit + 1
        theta = self.host.run.world.model.initial()
        msg = {**pack(theta=theta), **(told or {})}
        return self.said({"op": "ask", "round": round, "visit": self.visit, "phase": f"{self.stack[0]}.{phase}",
                          "attempt": attempt, "stack": stack or self.stack}, codec.encode(msg))


def code(said):
    return said["refused"]["code"] if "refused" in said else None


def test_a_message_cannot_switch_a_layer_off(tmp_path, tiny_llama_folder):
    """Finding 1: with `layers: [secagg]` the plain stack, and a message outside of the layer's session, get nothing."""
    far = Asker(tmp_path, tiny_llama_folder, {"layers": ["secagg"]}, layers=["secagg"])
    assert "refused" not in far.open()
    for stack in (far.stack[:1], [*far.stack[:1], "ModelUsage"], [*far.stack, "Examiner"], [], ["SecAgg"]):
        assert code(far.ask(stack=stack or ["x"])) == "stack"
    assert code(far.ask()) == "stack"  # all layers, and no session
    assert code(far.ask(told={"_secagg/sid": "of mine"})) == "message"  # a session that it never joined
    assert code(Asker(tmp_path, tiny_llama_folder, layers=["secagg"]).open()) == "layers"


def test_dp_sgd_is_applied_to_every_ask_and_its_budget_is_the_sites(tmp_path, tiny_llama_folder):
    """Findings 2 and 10: epsilon alone works at a site, and its own ledger stops before the bound, in any run."""
    budget = 3.0
    spec = {"layers": [{"name": "dp_sgd", "epsilon": budget}], "rounds": 3}
    far = Asker(tmp_path, tiny_llama_folder, spec, most_epsilon=budget)
    assert "refused" not in far.open()
    answers = [far.ask(round=r) for r in range(8)]
    given = [a for a in answers if "reply" in a]
    assert 3 <= len(given) < 8 and {code(a) for a in answers[len(given):]} == {"budget_spent"}
    assert all("loss" not in a["reply"] for a in given)
    spent = SiteLedger(tmp_path / "store").epsilon(1e-5)
    assert 0.5 * budget < spent <= budget
    again = Asker(tmp_path, tiny_llama_folder, spec, most_epsilon=budget)  # its process was started again
    assert "refused" not in again.open("r2")
    assert code(again.ask(attempt="b")) == "budget_spent"
    assert SiteLedger(tmp_path / "store").epsilon(1e-5) == spent
    assert code(far.ask("score", told={"on": "local"}, stack=far.stack[:1])) == "tests"


@pytest.mark.parametrize("knobs, why", [
    ({"epsilon": 3.0, "seed": 0}, "noise"), ({"epsilon": 3.0, "delta": 0.01}, "noise"),
    ({"noise_multiplier": 0.001, "epsilon": 3.0}, "noise"), ({"noise_multiplier": 1.0}, "epsilon"),
    ({"epsilon": 9.0}, "epsilon")], ids=["seeded", "delta", "tiny", "no budget", "above"])
def test_noise_that_protects_nobody_is_refused(tmp_path, tiny_llama_folder, knobs, why):
    far = Asker(tmp_path, tiny_llama_folder, {"layers": [{"name": "dp_sgd", **knobs}]}, most_epsilon=3.0)
    assert code(far.open()) == why


@pytest.mark.parametrize("spec, settings, why", [
    ({"layers": ["secagg"], "select": "oort"}, {"layers": ["secagg"]}, "layers"),
    ({"layers": ["att_byzantine"]}, {}, "layers"), ({"select": "oort"}, {}, None)],
    ids=["reads beside", "attack", "plain"])
def test_layers_that_read_rows_or_attack_are_refused(tmp_path, tiny_llama_folder, spec, settings, why):
    assert code(Asker(tmp_path, tiny_llama_folder, spec, **settings).open()) == why


def test_a_function_judges_a_sites_rows_only_where_it_is_named(tmp_path, tiny_llama_folder, monkeypatch):
    """Nothing is imported for a coordinator's sake: the module would say so."""
    (tmp_path / "planted_metric.py").write_text("raise SystemExit('it ran')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    asked = {"evaluate": {"metric": ["exact", "call:planted_metric:x"]}}
    assert code(Asker(tmp_path, tiny_llama_folder, metrics=["operator:eq"]).open(**asked)) == "metric"
    assert "refused" not in Asker(tmp_path, tiny_llama_folder, metrics=["operator:eq"]).open(
        evaluate={"metric": "call:operator:eq"})
    assert code(Asker(tmp_path, tiny_llama_folder).open(evaluate={"metric": ["last_number", 3]})) == "recipe"


def test_noise_of_the_coordinator_counts_only_where_it_is_trusted(tmp_path, tiny_llama_folder):
    spec = {"layers": [{"name": "dp_fedavg", "epsilon": 3.0}]}
    assert code(Asker(tmp_path, tiny_llama_folder, spec, most_epsilon=3.0).open()) == "epsilon"
    far = Asker(tmp_path, tiny_llama_folder, spec, most_epsilon=3.0, noise_by_coordinator=True)
    assert "refused" not in far.open()
    assert code(far.ask()) == "stack"  # no clip was told
    given = [far.ask(round=r, told={"_dp/clip": 0.1, "_dp/lift": True, "_dp/change": []}) for r in range(4)]
    assert sum("reply" in g for g in given) == 2 and code(given[-1]) == "budget_spent"


def test_rounds_are_counted_by_what_was_answered(tmp_path, tiny_llama_folder):
    """Finding 2: most_rounds holds whatever numbers the head says, after a restart, and over runs if so set."""
    far = Asker(tmp_path, tiny_llama_folder, most_rounds=2, rounds_in_all=3)
    assert "refused" not in far.open()
    assert "reply" in far.ask(round=11000) and "reply" in far.ask(round=0, attempt="b", visit=1)
    assert "reply" in far.ask(round=0, attempt="c", visit=1)  # the same question again is the same answer
    assert code(far.ask(round=0, attempt="d", visit=2)) == "rounds_spent"
    far = Asker(tmp_path, tiny_llama_folder, most_rounds=2, rounds_in_all=3)
    assert "refused" not in far.open()
    assert code(far.ask(round=0, attempt="e", visit=5)) == "rounds_spent"
    assert "refused" not in far.open("r2") and "reply" in far.ask(round=5)
    assert code(far.ask(round=6)) == "rounds_spent"
    assert code(far.open("r3", rounds=5)) == "rounds"


def test_work_is_bounded(tmp_path, tiny_llama_folder):
    """Finding 19: steps, tokens and seconds, of one answer and in all."""
    far = Asker(tmp_path, tiny_llama_folder, most_steps=5, tokens_in_all=150)
    assert code(far.open(local={"steps": 10**8})) == "work"
    assert "refused" not in far.open()
    with pytest.raises(FedLLMError, match="most_steps"):
        far.host.run.guard.work(6, 0)
    far.host.run.guard.begin(far.host.run.question({"phase": "FedAvg.score", "stack": ["FedAvg"],
                                                    "round": 0, "visit": 1}, {})[0], b"")
    answers = [far.ask(round=r) for r in range(8)]
    assert "reply" in answers[0] and code(answers[-1]) == "work_spent"
    assert 0 < SiteLedger(tmp_path / "store").read()["work"]["steps"] <= 14
    slow = Asker(tmp_path, tiny_llama_folder, most_seconds=1e-6, rows_may_change=True)
    assert "refused" not in slow.open("r4") and code(slow.ask()) == "work_spent"
    fat = Asker(tmp_path, tiny_llama_folder, most_memory_bytes=1 << 20, rows_may_change=True)
    assert "refused" not in fat.open("r5") and code(fat.ask()) == "memory"


def test_endpoints_keys_and_hosts_are_the_sites(tmp_path, tiny_llama_folder, monkeypatch):
    """Finding 3: the coordinator's URL and the name of a key are never used."""
    monkeypatch.setenv("HOSPITAL_SECRET", "s3cret")
    method = {"name": "fed_bbpt", "endpoint": "http://evil.example:1/v1", "api_key_env": "HOSPITAL_SECRET",
              "words": ["one", "two"]}
    spec = {"method": method, "space": {"name": "soft_prompt", "length": 4}}
    assert code(Asker(tmp_path, tiny_llama_folder, spec).open()) == "endpoint"
    mine = {"url": "http://127.0.0.1:9/v1", "model": "ours", "key_env": "OUR_KEY"}
    far = Asker(tmp_path, tiny_llama_folder, spec, endpoint=mine)
    assert "refused" not in far.open()
    asked = far.host.run.stack[0]
    assert (asked.endpoint, asked.endpoint_model, asked.api_key_env) == (mine["url"], "ours", "OUR_KEY")
    far = Asker(tmp_path, tiny_llama_folder)
    assert code(far.open(model={"name": "owner/on-the-hub"})) == "network"
    assert code(far.open(model={"name": "/etc"})) == "path"
    assert code(far.open(layers=[{"name": "secagg", "keys": "/etc/ssl"}])) == "path"
    assert code(far.open(select={"name": "uniform", "x": "https://evil.example"})) in ("network", "recipe")
    assert code(far.open(model={"name": tiny_llama_folder, "trust_remote_code": True})) == "remote_code"


def test_fields_and_labels_are_fixed_before_a_row_is_read(tmp_path, tiny_llama_folder):
    """Finding 4: `open` repeated with other labels or fields tells nothing about any row."""
    (tmp_path / "rows.jsonl").write_text("".join(
        json.dumps({"text": "a note", "label": label, "name": "Jane Roe"}) + "\n" for label in ("ill", "well", "ill")))
    data = {"task": "classification", "labels": ["x"]}
    far = Asker(tmp_path, tiny_llama_folder, {"data": data})
    first = far.open()
    assert code(first) == "data" and set(first["refused"]) <= {"code", "row", "line"}
    for labels in (["ill"], ["ill", "well"], ["x", "ill"]):
        assert code(far.open(data={"labels": labels})) == "fields"
    assert code(far.open(data={"fields": {"text": "name"}})) == "fields"
    set_ = Asker(tmp_path, tiny_llama_folder, {"data": {**data, "labels": ["ill", "well"]}}, task="classification",
                 labels=["ill", "well"], fields={}, store=str(tmp_path / "other"))
    assert "refused" not in set_.open("r2")
    assert code(set_.open("r3", data={"labels": ["ill", "well", "x"]})) == "fields"


def test_no_text_leaves_by_default_in_any_shape():
    """Finding 9: nested lists, bytes and text in keys are text too; the words of the protocol itself are not."""
    mine = SiteSettings(data="d", store="s")
    x = torch.zeros(2)
    secrets = [{"t": "a secret"}, {"t": ["a secret"]}, {"t": [[1, ["a secret"]]]}, {"t": b"a secret"},
               {"t": [b"a secret"]}, {"Jane Roe, 44": x}, {"theta/Jane Roe": 1.0}, {"t": {"a": 1}}, {"x" * 600: 1},
               {"t": '["a secret"]'}, {"Zoe_Quick": x}, {"delta/Zoe": x}, {"7041": x}, {"t": "7041"},
               {"t": '[["delta/w","a secret",[2]]]'}]
    words = Words.of(["site-b"], ["delta/model.layers.0.w", "n"])
    for payload in secrets:
        assert "lets no text leave" in (mine.may("up", payload, words) or ""), payload
    for payload in ({"delta/model.layers.0.w": x, "n": 3, "loss": 0.5, "ok": True, "none": None, "many": [[1, 2.0]]},
                    {"to": ["site-b"], "layout": '[["delta/model.layers.0.w","float32",[2]]]'},
                    {"names": [["delta/w", "float32", 2]]}):
        assert mine.may("up", payload, words) is None, payload
    assert mine.may("up", {"mail": [b"sealed"]}, words, sealed=True) is None
    assert SiteSettings(data="d", store="s", text_leaves=True).may("up", secrets[0]) is None


def test_a_fresh_join_takes_methods_that_send_tensors(tmp_path, tiny_llama_folder):
    """Methods whose cards say that they send words or tokens are refused by default; the others open."""
    declared = {m for m in modules() if method_class(m).card.kinds}
    assert declared == {"fed_sp_sc", "fedyolo", "fed_gfpt"} | declared
    far = Asker(tmp_path, tiny_llama_folder, {"method": "fed_sp_sc"})
    assert code(far.open()) == "text"


def test_what_a_site_declares_is_numbers_and_single_words():
    for profile in ({"rank": "<script>"}, {"modality": "Jane Roe is ill"}, {"note": 1}, {"speed": float("inf")},
                    {"rank": True}):
        with pytest.raises(RecipeError, match="profile"):
            SiteSettings.make({"data": "d", "store": "s", "profile": profile})
    assert SiteSettings.make({"data": "d", "store": "s", "profile": {"rank": 4, "modality": "text"}}).profile
    assert {f.name for f in dataclasses.fields(Profile)} == {*PROFILE, "model"}  # a site's `model` is a key of its own


def test_the_ledger_is_on_disk_before_an_answer_and_only_its_owner_reads_it(tmp_path):
    ledger = SiteLedger(tmp_path / "store")
    ledger.spend(Release(2.0), 3, 10.0, 1e-5)
    assert ledger.answer("r", "local", 2, "k1", 1, None) is None
    assert ledger.answer("r", "local", 2, "k2", 1, None) is None
    assert "allowed are 1" in ledger.answer("r", "local", 2, "k3", 1, None)
    kept = SiteLedger(tmp_path / "store").read()
    assert kept["releases"] == [[2.0, "none", 1.0, 0, 3]] and kept["runs"]["r"]["local"]["answers"] == 2
    assert (tmp_path / "store").stat().st_mode & 0o777 == 0o700
    assert ledger.path.stat().st_mode & 0o777 == 0o600


def test_every_reason_has_a_sentence():
    assert all(text and not text.endswith(".") for text in REASONS.values())


def test_a_site_knows_its_rows_again(tmp_path, tiny_llama_folder):
    """Finding 18: after a restart another file in the place of the run's rows is refused; what it is stays here."""
    far = Asker(tmp_path, tiny_llama_folder)
    said = far.open()
    kept = json.loads((tmp_path / "store" / "r1" / "identity.json").read_text())
    assert said["weights"] == kept["weights"] and kept["rows"] not in json.dumps(said)
    assert "refused" not in Asker(tmp_path, tiny_llama_folder).open()
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "one more", "response": "row"}) + "\n")
    assert code(Asker(tmp_path, tiny_llama_folder).open()) == "rows_differ"
    assert "refused" not in Asker(tmp_path, tiny_llama_folder).open("r2")  # another run begins with them
