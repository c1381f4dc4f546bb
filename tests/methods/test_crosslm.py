"""CrossLM: grades are all that leaves, and what is graded well becomes likelier."""

from __future__ import annotations

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import torch.nn.functional as F

from fedllm.core.errors import CompositionError, EndpointError, QuorumError, RecipeError, Withheld
from fedllm.core.program import drive
from fedllm.core.record import Record
from fedllm.local.objectives.rewarded import Rewarded
from fedllm.methods._written import graded, need_variety
from fedllm.methods.registry import make_method
from fedllm.models.batch import collate
from fedllm.models.endpoint import Endpoint
from fedllm.models.shelf import Shelf
from fedllm.runs.used import ModelUsage

KNOBS = {"texts": 6, "max_new_tokens": 4, "write_steps": 2, "least_new": 0.0}


def begun(begin, **knobs):
    return begin("crosslm", task="classification", **{**KNOBS, **knobs})


def test_only_grades_leave(begin):
    run, seen = begun(begin), []
    emit = run.engine.record.crossed

    def crossed(way, phase, client, size, round, name, **holds):
        if way == "up":
            seen.append(holds)
        return emit(way, phase, client, size, round, name, **holds)

    run.engine.record.crossed = crossed
    run.go(2)
    assert seen and all(h["clear"] == "numbers, tensors" for h in seen)
    sent = [e["bytes"] for e in run.engine.record.events if e.get("direction") == "up"]
    assert max(sent) < 400  # six numbers and a loss, whatever a model's size


def test_grades_are_means_over_those_with_an_opinion():
    told = [torch.tensor([0.2, -1.0, -1.0]), torch.tensor([0.6, 0.5, -1.0])]
    assert graded(told) == pytest.approx([0.4, 0.5, -1.0])


def test_the_reward_pulls_and_pushes_no_further_than_the_bound(begin):
    run = begin("fedavg", engine="in_process")
    model, rows = run.world.model, run.world.encoded("c0", "public")[:3]
    batch = collate([rows], model.pad, model.device)
    with torch.no_grad(), model.using([model.initial()]):
        at, z, y = model.target_logits(batch)
        ce = torch.zeros(3).double().index_add(0, at, F.cross_entropy(z, y, reduction="none"))
        side = {"reward": torch.tensor([0.5, -0.5, -0.5]), "words": torch.zeros(3, 9, 1).long(),
                "p": torch.zeros(3, 9, 1)}
        got, n = Rewarded(beta=0.0, bound=5.0).losses(model, batch, side)
        shut, _ = Rewarded(beta=0.0, bound=1e-3).losses(model, batch, side)
    want = [0.5 * ce[0], *(0.5 * (5 * n[i] - ce[i]).clamp(min=0) for i in (1, 2))]
    assert got.tolist() == pytest.approx([float(x) for x in want]) and shut[1:].tolist() == [0.0, 0.0]


def test_well_graded_texts_become_likelier_and_bad_ones_less_so(begin):
    run = begun(begin, engine="in_process", write_steps=8)
    held, call = run.world.models["writer"], {}
    kept = type(run.method).write

    class Look(type(run.method)):
        """Hands out the server's call."""

    def write(self, msg, client):
        call["server"] = client
        return kept(self, msg, client)

    write.__dict__.update(kept.__dict__)
    Look.write, Look.__name__ = write, "CrossLM"
    object.__setattr__(run.method, "__class__", Look)
    run.go(1)
    msg = {"labels": ["one", "two", "three"], "texts": ["w1 w2 w3", "w40 w41 w42"], "of": [0, 0], "grades": [0.9, 0.1]}
    server = call["server"].holding("writer")
    rows = server.encode([{"prompt": "one:", "response": t} for t in msg["texts"]])
    theta = {k.removeprefix("writer/"): v for k, v in run.method.learn(msg, call["server"]).items()}
    before, after = (server.probe([t], on=rows)[0].total for t in (held.initial(), theta))
    assert after[0] < before[0] and after[1] > before[1]


def test_a_writer_that_repeats_itself_is_no_round(begin):
    with pytest.raises(Withheld, match=r"models.writer repeats itself: 1 of its 4 texts are new.*\(3 times 'a b'\)"):
        need_variety("writer", ["a b", "a  b", "", "a b"], 0.5)
    assert need_variety("writer", ["a", "b", "a", ""], 0.5) == [0, 1]
    run = begun(begin, least_new=1.0, temperature=1e-6)  # greedy: six prompts of three labels
    with pytest.raises(QuorumError, match=r"models.writer repeats itself"):
        run.go(1)
    assert run.up() == 0


class Slow(BaseHTTPRequestHandler):
    """Lets everybody wait."""

    def do_POST(self):
        self.server.gone.wait(5)

    def log_message(self, *args):
        pass


class Ready(Slow):
    """Says three words, another each time, to whoever asks for a label."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["prompt"] in ("one:", "two:", "three:") and asked["max_tokens"] == 4
        body = json.dumps({"choices": [{"text": f" w1 w2 w{asked['seed'] % 50}"}],
                           "usage": {"prompt_tokens": 2, "completion_tokens": 3}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def serving():
    """Addresses of servers, each with its handler."""
    made = []

    def start(handler):
        made.append(server := ThreadingHTTPServer(("127.0.0.1", 0), handler))
        server.gone = threading.Event()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/v1"

    yield start
    for server in made:
        server.gone.set()
        server.shutdown()
        server.server_close()


def test_an_endpoint_writes_and_is_paid(begin, serving):
    ledger, url = ModelUsage({"writer": (1.0, 3.0)}), serving(Ready)
    run = begun(begin, reinforce=False, accept=0.0, layers=(ledger,))
    run.world.models = Shelf({"writer": lambda: Endpoint(url, timeout=60.0, retries=0, logprobs=False)})
    states = [ledger.init()]
    run.engine.begin(0)
    state = drive(run.method.round(run.state, run.world.infos()), run.engine, (ledger,), states)
    assert len(state["texts"]) == 6 and all(t.startswith(" w1 w2 w") for t in state["texts"])
    said = ledger.report(states[0])["writer"]
    assert said == {"calls": 6, "prompt_tokens": 12, "completion_tokens": 18, "cost": pytest.approx(66e-6)}
    run = begun(begin)
    run.world.models = Shelf({"writer": lambda: Endpoint(url, timeout=60.0, retries=0, logprobs=False)})
    with pytest.raises(CompositionError, match=r"models.writer cannot be trained, which method.reinforce wants"):
        run.go(1)


def test_a_writer_that_does_not_answer_ends_the_run_and_nothing_leaves(begin, serving):
    run, silent = begun(begin, reinforce=False), serving(Slow)
    run.world.models = Shelf({"writer": lambda: Endpoint(silent, timeout=0.2, retries=0, backoff=0.0)})
    with pytest.raises(EndpointError, match=r"model 'local': no answer within 0.2 s"):
        run.go(1)
    assert run.up() == 0


def test_what_the_writer_cost_stands_in_the_ledger(begin):
    """Calls and tokens of the server's own model too, and what they cost by its prices."""
    ledger = ModelUsage({"writer": (1.0, 3.0)})
    run = begin("crosslm", task="classification", layers=(ledger,), **KNOBS)
    states = [ledger.init()]
    run.engine.begin(0)
    drive(run.method.round(run.state, run.world.infos()), run.engine, (ledger,), states)
    said = ledger.report(states[0])["writer"]
    assert said["calls"] >= 6 and 6 <= said["completion_tokens"] <= 24
    assert said["cost"] == pytest.approx((said["prompt_tokens"] + 3 * said["completion_tokens"]) / 1e6)
    assert math.isfinite(said["cost"]) and isinstance(run.engine.record, Record)


def test_a_prompt_without_the_label_is_refused():
    with pytest.raises(RecipeError, match=r"CrossLM.prompt = 'write' is not allowed; it must name \{label\}"):
        make_method("crosslm", prompt="write")
    for odd in ("{label} {other}", "{label", "{label:d}", "{label} {0}"):
        with pytest.raises(RecipeError, match=r"nothing else in braces"):
            make_method("crosslm", prompt=odd)
