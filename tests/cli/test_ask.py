"""`fedllm ask`: an answering method is run like a training one, and every answer names whom it rests on."""

import json
import time

import pytest

import fedllm
from fedllm.core.ask import Ask, on_client
from fedllm.core.errors import RecipeError, RunError
from fedllm.core.method import Method
from fedllm.runs.asking import Heard, within
from tests.cli.test_cli import call

SAME = "say the word red cat"


@pytest.fixture
def asking(recipe):
    """Four clients; two of them pool a wording of the same question."""
    recipe |= {"method": {"name": "fed_sp_sc", "embed": "tfidf", "max_new_tokens": 3, "similarity_threshold": 0.0},
               "rounds": 1, "clients": {"per_round": 1.0}}
    recipe["data"] |= {"partition": {"kind": "iid", "clients": 3}, "limit": 12, "test": 0.0}
    return recipe


def test_from_a_recipe(asking):
    got, again = fedllm.ask(asking, SAME, SAME)
    assert got.answer and got.answer == again.answer and got.question == SAME
    assert set(got.clients) <= {"client-0", "client-1", "client-2"} and got.seconds > 0 and not got.missing
    assert got.said["thoughts"] and got.bytes["up"] == 0  # the pool was collected in the round, not for the question
    agreed = {t["author"] for t in got.said["thoughts"] if t["answer"] == got.answer and t["author"]}
    assert set(got.clients) == agreed


def test_a_run_is_asked_from_its_last_state(asking, tmp_path, capsys):
    run = fedllm.run(asking, root=tmp_path)
    [got], [fresh] = fedllm.ask(run.folder, SAME), fedllm.ask(asking, SAME)
    assert (got.answer, got.clients) == (fresh.answer, fresh.clients)
    code, out, _ = call(capsys, "ask", str(run.folder), SAME, "--json")
    assert code == 0 and json.loads(out)["answer"] == got.answer and json.loads(out)["clients"] == list(got.clients)
    code, out, _ = call(capsys, "ask", str(run.folder), SAME)
    assert code == 0 and "rests on" in out


def test_what_cannot_be_asked_is_refused(asking, recipe, tmp_path, capsys):
    with pytest.raises(RecipeError, match=r"'fedavg' trains a model and answers no questions.*fed_sp_sc"):
        fedllm.ask({**asking, "method": "fedavg"}, SAME)
    with pytest.raises(RecipeError, match="question = '  '"):
        fedllm.ask(asking, "  ")
    with pytest.raises(RecipeError, match="timeout = 0"):
        fedllm.ask(asking, SAME, timeout=0)
    code, _, err = call(capsys, "ask", str(tmp_path), SAME)
    assert code == 2 and "no run folder" in err


class Slow(Method):
    def answer(self, query, clients):
        for _ in range(1000):
            yield Ask(self.wait, {c: {} for c in clients})
        return "late"

    @on_client()
    def wait(self, msg, client):
        return {}


def test_no_question_takes_longer_than_it_may():
    from tests.methods.conftest import begin

    run = begin("fedavg")
    method = Slow()
    run.engine.stack = (method,)
    run.engine.work = lambda job, submit: time.sleep(0.05) or {}
    from fedllm.core.program import drive

    started, heard = time.monotonic(), Heard()
    with pytest.raises(RunError, match=r"timeout = 1\.5 s"):
        drive(within(method.answer("q", ["c0", "c1"]), started + 1.5, 1.5, heard), run.engine)
    assert time.monotonic() - started < 30 and set(heard.answered) == {"c0", "c1"}
