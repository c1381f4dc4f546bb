"""Segments: one after the other they are the model, forwards and backwards, for many clients in one step."""

import dataclasses
import json

import pytest
import torch

import fedllm
from fedllm.core.ask import Ask, on_client
from fedllm.core.errors import CompositionError, ModelError, QuorumError, RecipeError
from fedllm.core.method import Method
from fedllm.core.payload import add
from fedllm.core.program import drive
from fedllm.engines import ENGINES
from fedllm.engines.client import ClientCall
from fedllm.local.flops import FORWARD, steps_of, work_of
from fedllm.local.requests import Limits
from fedllm.local.segments import Backward, Forward, run_backwards, run_forwards
from fedllm.methods.registry import make_method
from fedllm.models.batch import Batch, collate
from fedllm.models.model import Model
from fedllm.models.segments import segments
from fedllm.privacy.dp_sgd import DPSGD
from fedllm.runs.fits import compose
from fedllm.runs.layers import make_layer
from fedllm.spaces import make_space
from tests.methods.conftest import begin, gap, llama, tokenizer

LR = 0.1


def model(space="full", net=None, **knobs):
    return Model(net or llama(), tokenizer(), "generation", make_space(space, **knobs), fast_kernels=False)


def unsplit(run, state, rows_of):
    """Gradient of every client's batch through the whole model, and its weight."""
    m, theta = run.world.model, {**state["ends"], **state["middle"]}
    for client, rows in rows_of.items():
        params = {n: t.clone().requires_grad_() for n, t in theta.items()}
        with m.using([theta], None, {n: p[None] for n, p in params.items()}):
            loss = m.losses(collate([[run.world.encoded(client, "train")[i] for i in rows]], m.pad, m.device))
            loss.sum().backward()
        yield client, {n: p.grad for n, p in params.items()}


@pytest.mark.parametrize("engine", ["in_process", "vectorized"])
def test_a_round_is_a_step_of_the_unsplit_model(engine):
    """fp64, clients with 5 to 12 rows and batches of unequal length, the middle at the server."""
    run = begin("fedbert_split", engine=engine, space="full", local={"batch_size": 64}, steps=1, cut=0)
    before = dict(run.state)
    rows = {c.id: range(c.n) for c in run.world.infos()}
    total = sum(c.n for c in run.world.infos())
    want = {**before["ends"], **before["middle"]}
    for client, g in unsplit(run, before, rows):
        want = add(want, g, -LR * len(rows[client]) / total)
    run.go(1)
    assert gap({**run.state["ends"], **run.state["middle"]}, want) < 1e-10
    assert gap(before["middle"], run.state["middle"]) > 1e-4


@pytest.mark.parametrize(("space", "knobs"), [("full", {}), ("lora", {"rank": 4}), ("ia3", {}), ("bias", {})])
@pytest.mark.parametrize("cuts", [[1], [0, 1], [0, 2]])
def test_gradients_of_segments_are_the_models(space, knobs, cuts):
    m = model(space, gpt2() if space == "bias" else llama(), **knobs)
    rng = torch.Generator().manual_seed(3)
    lanes = []
    for k, (b, t) in enumerate([(3, 7), (2, 4), (5, 9)]):
        theta = {n: v.double() + 0.01 * torch.randn(v.shape, generator=rng, dtype=torch.float64)
                 for n, v in m.initial().items()}
        ids = torch.randint(4, 60, (b, t), generator=rng)
        mask = torch.arange(t)[None] < torch.randint(2, t + 1, (b, 1), generator=rng)
        labels = torch.where(mask, ids, -100)
        lanes.append((f"c{k}", theta, ids, mask, labels))
    parts = segments(m, cuts)
    for at in (lanes, lanes[:1]):  # three clients in one step, and one alone
        got = through(m, parts, at)
        for (name, theta, ids, mask, labels), (loss, slopes) in zip(at, got, strict=True):
            params = {n: t.clone().requires_grad_() for n, t in theta.items()}
            with m.using([theta], None, {n: p[None] for n, p in params.items()}):
                want = m.losses(Batch(1, ids, mask, labels))
                want.sum().backward()
            assert loss == pytest.approx(float(want.detach()), abs=1e-10), name
            assert gap(slopes, {n: torch.zeros_like(p) if p.grad is None else p.grad
                                for n, p in params.items()}) < 1e-10


def through(m, parts, lanes):
    """Each lane's loss and gradients, segment after segment, all lanes in one request group."""
    limits = Limits()
    xs = [[ids] for _, _, ids, _, _ in lanes]
    for seg in parts[:-1]:
        asks = [Forward(c, m, seg.part(m, th), None, seg, x[-1], mask) for (c, th, _, mask, _), x in zip(lanes, xs,
                                                                                                  strict=True)]
        assert len({a.group for a in asks}) == 1
        for x, h in zip(xs, run_forwards(asks, limits), strict=True):
            x.append(h)
    total = [{} for _ in lanes]
    gs, told = [None] * len(lanes), None
    for i, seg in reversed(list(enumerate(parts))):
        asks = [Backward(c, m, seg.part(m, th), None, seg, x[i], mask, g, labels if seg.last else None)
                for (c, th, _, mask, labels), x, g in zip(lanes, xs, gs, strict=True)]
        got = run_backwards(asks, limits)
        told = told or [g.loss for g in got]
        gs = [g.x for g in got]
        for acc, g in zip(total, got, strict=True):
            for n, t in g.theta.items():
                acc[n] = acc[n] + t if n in acc else t
    return list(zip(told, total, strict=True))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(1)
        return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=4,
                                          attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)).double()


def test_cuts_that_do_not_fit_are_refused():
    m = model()
    for cuts in ([3], [-1], [1, 1], [2, 1], [], [0.5]):
        with pytest.raises(RecipeError, match="allowed are increasing whole numbers from 0 to 2"):
            segments(m, cuts)
    with pytest.raises(CompositionError, match=r"method\.cut = 1 leaves the server none of the model's 2 blocks"):
        begin("fedbert_split", space="full", cut=1)
    with pytest.raises(ModelError, match="soft_prompt' cannot be cut"):
        segments(model("soft_prompt", length=4), [1])


def test_what_a_segment_costs():
    m = model()
    front, middle, back = segments(m, [0, 2])
    mask = torch.ones(3, 5, dtype=torch.bool)
    h = torch.zeros(3, 5, 16, dtype=torch.float64)
    ahead = Forward("c", m, middle.part(m, m.initial()), None, middle, h, mask)
    again = Backward("c", m, ahead.theta, None, middle, h, mask, h)
    assert steps_of(again, 3) == pytest.approx(steps_of(ahead, 3) / FORWARD)
    assert steps_of(again, 3) + sum(steps_of(Backward("c", m, {}, None, s, h, mask, h), 3) for s in (front, back)) == (
        pytest.approx(1.0))
    weights = 2 * (2 * 16 * 16 + 2 * 8 * 16 + 3 * 16 * 24)  # q, o; k, v; gate, up, down; two blocks
    assert work_of(ahead).tokens == 15
    assert work_of(ahead).flops == pytest.approx(2 * weights * 15 + 4 * 2 * 16 * 3 * 25)
    assert work_of(again).flops == pytest.approx(3 * work_of(ahead).flops)


def test_bytes_of_a_step():
    """Up e and dL/dh, down h and dL/de: 4 B T d numbers a step, and nothing that holds an id or a label."""
    run = begin("fedbert_split", space="full", local={"batch_size": 64}, steps=1).go(1)
    sizes = {(w, f): run.engine.record.bytes[w, f"FedBERTSplit.{f}"] for w, f in [
        ("up", "begin"), ("down", "top"), ("up", "top"), ("down", "turn")]}
    batches = [collate([run.world.encoded(c.id, "train")], 0, "cpu").ids.shape for c in run.world.infos()]
    states = sum(b * t for b, t in batches) * 16 * 8
    for (way, phase), size in sizes.items():
        mask = sum(b * t for b, t in batches) if (way, phase) == ("up", "begin") else 0
        assert states + mask < size < states + mask + 4 * 400, (way, phase)


@dataclasses.dataclass(frozen=True)
class Leaves(Method):
    """Puts something into its scratch, and asks for it again."""

    def init(self, model):
        return {}

    def round(self, state, clients):
        if not state.get("again"):
            yield Ask(self.put, {c.id: {} for c in clients})
        out = yield Ask(self.get, {c.id: {} for c in clients})
        return {"got": {c: out[c]["x"] for c in out}, "again": 1}

    @on_client()
    def put(self, msg, client):
        client.session["x"] = int(client.id[1:])
        return {}

    @on_client()
    def get(self, msg, client):
        return {"x": client.session["x"]}


@pytest.mark.parametrize("engine", ["in_process", "vectorized"])
def test_scratch_lasts_one_round_and_never_reaches_memory(engine):
    run = begin("fedavg", engine=engine)
    method = Leaves()
    driver = ENGINES[engine]((method,), run.world)
    driver.begin(0)
    state = drive(method.round({}, run.world.infos()), driver, [])
    assert state["got"] == {f"c{i}": i for i in range(4)}
    driver.commit()
    assert not any(driver.memory.values())
    driver.begin(1)
    with pytest.raises(QuorumError, match="'x' is not in this round's scratch"):
        drive(method.round(state, run.world.infos()), driver, [])
    for end in (driver.abandon, driver.commit):
        driver.begin(2)
        drive(method.round({}, run.world.infos()), driver, [])
        end()
        assert not driver._sessions


def test_secure_aggregation_refuses_a_server_that_reads_each_clients_states():
    with pytest.raises(CompositionError, match=r"secagg' lets the server see sums only and 'FedBERTSplit.begin' needs"):
        compose(make_method("fedbert_split"), [make_layer("secagg", {}, "layers.0")])


def test_a_recipe_runs_and_is_metered(tmp_path, tiny_llama_folder):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"say the {w}", "response": w}) + "\n"
                            for w in ["red", "green", "blue", "one", "two", "cat"] * 4))
    spec = {"model": tiny_llama_folder, "method": {"name": "fedbert_split", "steps": 2}, "space": "full", "rounds": 2,
            "data": {"source": str(rows), "partition": {"kind": "iid", "clients": 3}, "test": 0.2}, "energy": {},
            "local": {"optimizer": "sgd", "lr": 0.1, "batch_size": 4}, "evaluate": {"exact_match": False, "samples": 0},
            "clients": {"step_seconds": 1.0}}
    result = fedllm.run(spec, root=tmp_path)
    assert result.evaluation["global"]["loss"] < result.evaluation["before"]["global"]["loss"]
    assert result.reports["EdgeEnergy"]["joules"] > 0 and result.virtual["seconds"] > 0
    with pytest.raises(CompositionError, match=r"fedbert_split and local.optimizer = 'adamw' .*plain SGD"):
        fedllm.run(spec, root=tmp_path, **{"local.optimizer": "adamw"})


def test_example_level_dp_refuses_segments():
    layer = DPSGD(clip_norm=1.0, noise_multiplier=1.0)
    with pytest.raises(CompositionError):
        begin("fedbert_split", space="full", layers=(layer,)).go(1)
    run, seen = begin("fedavg", space="full", layers=(layer,)), []

    def probe(msg, client):
        m = client.model
        with client.through(lambda r: layer._private(r, client)):
            client.forward(segments(m, [1])[0], {}, torch.ones(1, 3, dtype=torch.long), torch.ones(1, 3) > 0)

    call = ClientCall(run.world.infos()[0], run.world, {}, 0, "P.x", 1, seen.append)
    with pytest.raises(CompositionError):
        probe({}, call)
    assert not seen
