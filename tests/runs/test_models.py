"""Models by name and by client: whose model answers whom, whose tokenizer reads what, what it costs, what is not."""

import importlib.util
import json
from dataclasses import dataclass, replace

import pytest
import torch
from transformers import AutoTokenizer

import fedllm
from fedllm.cli.serve_model import serving
from fedllm.core.ask import Ask, on_client
from fedllm.core.errors import CompositionError, EndpointError, ModelError, RecipeError
from fedllm.core.method import Method
from fedllm.core.payload import leaves
from fedllm.core.program import drive
from fedllm.engines import ENGINES
from fedllm.federation.process import free_port
from fedllm.local.text import LocalText
from fedllm.models.load import load_model
from fedllm.runs.build import build
from fedllm.runs.course import Course
from fedllm.runs.folder import RunFolder
from fedllm.runs.plan import plan
from fedllm.runs.recipe import load_recipe
from fedllm.spaces import make_space
from tests.conftest import WORDS


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    path = tmp_path_factory.mktemp("films") / "films.jsonl"
    path.write_text("".join(json.dumps({"text": f"the film is {w} {WORDS[i % 9]} {'a ' * (i % 5)}", "label": w}) + "\n"
                            for i in range(50) for w in ("good", "bad")))
    return str(path)


@pytest.fixture
def mixed(films, tiny_bert_folder, wide_bert_folder):
    """FedMD over four clients of two designs."""
    return {"name": "mixed", "model": {"name": tiny_bert_folder, "fast_kernels": False},
            "models": {"wide": wide_bert_folder}, "clients": {"models": ["wide", tiny_bert_folder]}, "rounds": 2,
            "method": {"name": "fedmd", "alignment": 12, "transfer_steps": 3, "own_steps": 2, "digest_steps": 3},
            "space": {"name": "lora", "rank": 2}, "local": {"optimizer": "sgd", "lr": 0.1, "steps": 2, "batch_size": 5},
            "data": {"source": films, "task": "classification", "public": 0.2, "client_test": 0.2,
                     "partition": {"kind": "quantity", "clients": 4, "skew": 0.5}}}


def course(spec, engine, dtype="float64", rounds=2):
    """Memories, state, record and the parts after some rounds."""
    parts = build(load_recipe(spec, {"engine.kind": engine, "model.dtype": dtype}))
    made = Course(parts, parts.method, parts.layers)
    for t in range(rounds):
        assert "skipped" not in made.step(t)
    return made


def gap(a, b):
    a, b = dict(leaves(a)), dict(leaves(b))
    assert a.keys() == b.keys() and any(isinstance(v, torch.Tensor) for v in a.values())
    return max(float((v.double() - b[k].double()).abs().max()) for k, v in a.items() if isinstance(v, torch.Tensor))


@pytest.mark.parametrize(("dtype", "most"), [("float64", 1e-10), ("float32", 1e-5)])
def test_clients_of_two_designs_in_one_step_are_those_of_one_at_a_time(mixed, dtype, most):
    many, one = (course(mixed, engine, dtype) for engine in ("vectorized", "in_process"))
    sizes = {len(r.train) for r in many.parts.world.federation.clients.values()}
    assert len(sizes) > 1 and gap(many.engine.memory, one.engine.memory) < most
    assert many.record.totals() == one.record.totals() and many.report() == one.report()
    shapes = {c: m["theta"][next(n for n in m["theta"] if n.endswith("lora_A.weight"))].shape[1]
              for c, m in many.engine.memory.items() if "theta" in m}
    assert sorted(shapes.values()) == [32, 32, 48, 48]


def test_a_run_writes_each_client_s_adapter_over_its_own_model(mixed, wide_bert_folder, tmp_path):
    result = fedllm.run(mixed, root=tmp_path)
    configs = [json.loads(p.read_text()) for p in sorted(result.folder.glob("clients/*/theta/adapter_config.json"))]
    assert [c["base_model_name_or_path"] for c in configs] == [wide_bert_folder, mixed["model"]["name"]] * 2
    assert all(c["accuracy"] >= 0 for c in result.evaluation["clients"].values())
    told = result.reports["ModelUsage"]
    assert told.keys() == {"wide", mixed["model"]["name"]} and all(t["prompt_tokens"] > 0 for t in told.values())
    rounds = [e["models"]["wide"] for e in RunFolder(result.folder).events() if e["kind"] == "round"]
    assert sum(r["calls"] for r in rounds) == told["wide"]["calls"]


def test_a_resumed_run_of_two_designs_ends_where_an_undisturbed_one_does(mixed, tmp_path, monkeypatch):
    whole = fedllm.run(mixed, root=tmp_path)
    step = Course.step

    def cut(self, round):
        if round == 1:
            raise KeyboardInterrupt
        return step(self, round)

    monkeypatch.setattr(Course, "step", cut)
    with pytest.raises(KeyboardInterrupt):
        fedllm.run(mixed, root=tmp_path)
    monkeypatch.undo()
    again = fedllm.resume(tmp_path / "mixed-2")
    assert again.evaluation["clients"] == whole.evaluation["clients"] and again.reports == whole.reports


def test_plan_foresees_public_rows_and_two_designs(mixed):
    assert plan(mixed).up > 0


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_workers_of_ray_hold_the_same_models(mixed, tmp_path):
    far = fedllm.run(mixed, root=tmp_path, **{"engine": "ray", "model.dtype": "float64"})
    here = fedllm.run(mixed, root=tmp_path, **{"engine": "in_process", "model.dtype": "float64"})
    for client, said in here.evaluation["clients"].items():
        assert far.evaluation["clients"][client] == pytest.approx(said, abs=1e-10)
    assert far.reports == here.reports and far.bytes == here.bytes


# -- what a client function does with a model by its name --------------------------------------------------------------


@dataclass(frozen=True)
class Asks(Method):
    """Each client does something with the models by name; what comes of it is the state."""

    needed: tuple = ("small", "teacher")

    def asks_for(self):
        return self.needed

    def init(self, model):
        return {}

    def round(self, state, clients):
        return dict((yield Ask(self.work, {c.id: {} for c in clients})))

    @on_client()
    def work(self, msg, client):
        small, prompts = client.holding("small"), [r["prompt"] for r in client.data[:2]]
        theta = client.models["small"].initial()
        fitted = small.fit(theta, steps=2)
        vectors = client.holding("retriever").embed([r["response"] for r in client.data[:3]])
        return {"theta": fitted.theta["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"],
                "loss": small.loss(fitted.theta), "own": client.loss(client.model.initial()),
                "said": [c.text for c in client.models["teacher"].complete(prompts, 3)],
                "small": small.generate(prompts, fitted.theta, max_new_tokens=3),
                "vectors": torch.from_numpy(vectors)}


@pytest.fixture(scope="module")
def teacher(tiny_llama_folder):
    """A model of ours behind a real HTTP endpoint."""
    with serving(LocalText(load_model(tiny_llama_folder, "generation", make_space("lora")))) as running:
        yield running


@pytest.fixture
def named(recipe, teacher, wide_llama_folder, wide_bert_folder):
    recipe["model"] = {"name": recipe["model"], "dtype": "float64", "fast_kernels": False}
    recipe["local"] = {"optimizer": "sgd", "lr": 0.1, "batch_size": 4}
    recipe["space"] = {"name": "lora", "rank": 2}
    recipe["models"] = {"teacher": {"endpoint": {"base_url": teacher.base_url, "retries": 0, "timeout": 20.0}},
                        "small": wide_llama_folder, "retriever": wide_bert_folder}
    return recipe


def asked(spec, kind, method=None, layers=()):
    parts = build(load_recipe(spec))
    engine = ENGINES[kind]((method or Asks(), *(layers or parts.layers)), parts.world)
    infos = parts.world.infos()[:3]
    states = [x.init() for x in engine.stack[1:]]
    return drive(engine.stack[0].round({}, infos), engine, engine.stack[1:], states), states, engine, parts


def test_models_by_name_train_embed_and_answer(named):
    one, states, _, parts = asked(named, "in_process")
    many, again, _, _ = asked(named, "vectorized")
    assert parts.world.models["retriever"].task == "classification"  # beside a language model, for its vectors
    for client, said in one.items():
        assert said["said"] == many[client]["said"] and said["small"] == many[client]["small"]
        assert gap(*({k: s[k] for k in ("theta", "vectors")} for s in (said, many[client]))) < 1e-10
        assert said["loss"] == pytest.approx(many[client]["loss"], abs=1e-10)
        assert said["vectors"].shape == (3, 48) and float(said["theta"].abs().sum()) > 0
    assert states == again
    text = LocalText(load_model(named["model"]["name"], "generation", make_space("lora")))
    first = next(iter(parts.world.federation.clients))
    prompts = [r["prompt"] for r in parts.world.federation.clients[first].train[:2]]
    assert one[first]["said"] == [c.text for c in text.complete(prompts, 3)]
    told = states[0]["round"]
    assert told.keys() == {"small", "retriever", "teacher"}
    assert told["teacher"][:2] == [6, 6 * 6] and told["retriever"][0] == 9  # 2 prompts and 3 texts a client
    assert told["teacher"] == [getattr(parts.world.models["teacher"].usage, k)
                               for k in ("calls", "prompt_tokens", "completion_tokens")]


def test_each_model_reads_rows_by_its_own_tokenizer(named, wide_llama_folder):
    _, _, _, parts = asked(named, "in_process")
    client = next(iter(parts.world.federation.clients))
    small, row = parts.world.models["small"], parts.world.rows(client, "train")[0]
    ids = parts.world.encoded(client, "train", small)[0].ids.tolist()
    want = AutoTokenizer.from_pretrained(wide_llama_folder)(f"{row['prompt']} {row['response']}")["input_ids"]
    assert ids == [*want, 1] and ids != parts.world.encoded(client, "train")[0].ids.tolist()


@dataclass(frozen=True)
class Wrong(Method):
    """Client functions with a slip in them."""

    slip: str = ""

    def init(self, model):
        return {}

    def round(self, state, clients):
        return dict((yield Ask(self.work, {c.id: {} for c in clients})))

    @on_client()
    def work(self, msg, client):
        if self.slip == "name":
            client.models["smal"]
        if self.slip == "rows":
            client.holding("small").fit(client.models["small"].initial(), on=client.tokens, steps=1)
        if self.slip == "endpoint":
            client.holding("teacher").loss({})
        return {}


@pytest.mark.parametrize(("slip", "error", "says"), [
    ("name", CompositionError, r"there is no 'smal'; did you mean 'small'\? The recipe's models: has retriever, small"),
    ("rows", CompositionError, "is given rows that were tokenized for another model"),
    ("endpoint", ModelError, "is an endpoint: it continues text")])
def test_slips_of_client_functions_are_named(named, slip, error, says):
    with pytest.raises(error, match=says):
        asked(named, "vectorized", Wrong(slip))


def test_what_a_named_model_does_takes_time_and_energy(named):
    from fedllm.local.flops import steps_of, work_of
    from fedllm.local.requests import Complete

    _, _, _, parts = asked(named, "in_process")
    prompts = ["say the word", "red"]
    ours = Complete("c", parts.world.models["small"], {}, None, prompts, 3)
    theirs = replace(ours, model=parts.world.models["teacher"])
    assert work_of(ours).tokens == 2 * (3 + 1 + 2 * 3) and work_of(ours).flops > 0  # read on the way, and once more
    assert steps_of(ours, 4) == steps_of(theirs, 4) == pytest.approx(2 / 4 / 3)
    assert work_of(theirs).flops == 0  # another machine's


def test_sealed_means_sealed(named):
    named["models"]["small"] = {"name": named["models"]["small"], "sealed": True}
    parts = build(load_recipe(named))
    with pytest.raises(ModelError, match="black box"):
        parts.world.models["small"].net  # noqa: B018


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_a_name_that_the_method_needs_and_the_recipe_lacks(named, monkeypatch):
    monkeypatch.setattr(Method, "asks_for", lambda self: ("teacher", "studnt"))
    with pytest.raises(CompositionError, match="'fedavg' asks for a model that the recipe does not have: 'studnt'"):
        build(load_recipe(named))


@pytest.mark.parametrize(("key", "value", "error", "says"), [
    ("clients.models", ["smal"], RecipeError, r"clients.models.0: there is no 'smal'; did you mean 'small'\?"),
    ("clients.profiles", {"client-00": {"model": "x"}}, RecipeError, "profiles.client-00.model: there is no 'x'"),
    ("clients.models", ["./nowhere"], ModelError, "clients.models: './nowhere': model './nowhere' cannot be loaded"),
    ("clients.models", ["small"], CompositionError, "'fedavg' cannot join clients that hold 'small', another mod"),
    ("clients.models", ["teacher"], CompositionError, "'teacher', an endpoint, which only says text; methods that can"),
    ("clients.models", ["retriever"], ModelError, "cannot hold 'retriever': it is there for its vectors, and"),
    ("models.more", {"name": "a", "endpoint": {}}, RecipeError, "models.more.*give either name or endpoint"),
    ("models.more", {"nam": "a"}, RecipeError, "models.more.nam: unknown key; did you mean 'name'"),
    ("models.more", {"endpoint": {"base_url": "ftp://x"}}, RecipeError, "models.more.endpoint.*must start with http"),
    ("models.retriever.task", "generation", ModelError, "models.retriever: .* is an encoder, which says nothing"),
    ("models.more", "./nowhere", ModelError, "models.more: model './nowhere' cannot be loaded")])
def test_what_cannot_be_is_refused_when_the_run_is_built(named, key, value, error, says):
    with pytest.raises(error, match=says):
        build(load_recipe(named, {key: value}))


def test_an_endpoint_that_does_not_answer_is_found_before_any_work(named, tmp_path):
    url = f"http://127.0.0.1:{free_port()}/v1"
    named["models"]["teacher"]["endpoint"] |= {"base_url": url, "backoff": 0.0}
    with pytest.raises(EndpointError, match=rf"endpoint {url}/completions, model 'local': ConnectError"):
        fedllm.run(named, root=tmp_path)
    assert not list(tmp_path.iterdir())


def test_no_public_rows(mixed, tmp_path):
    mixed["data"]["public"] = 0.0
    with pytest.raises(CompositionError, match="'fedmd' works on public rows at the clients, and the data has none"):
        fedllm.run(mixed, root=tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_endpoint_is_a_caution(named, teacher, tmp_path):
    result = fedllm.run(named, root=tmp_path, rounds=1)
    said = [e["why"] for e in RunFolder(result.folder).events() if e["kind"] == "caution"]
    assert [teacher.base_url in s for s in said if "leaves them" in s] == [True]
    assert "To bear in mind" in (page := result.report_path.read_text()) and teacher.base_url in page
