"""A judge over HTTP: verdicts in both orders, what counts as a tie and what as nothing, deadlines, tokens, keys."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from typer.testing import CliRunner

import fedllm
from fedllm.cli.main import app
from fedllm.cli.serve_model import serving
from fedllm.core.errors import DataError, EndpointError
from fedllm.evaluation.duel import Question, duel, outcome, read_questions, shown, verdict
from fedllm.local.text import LocalText
from fedllm.models.endpoint import Endpoint
from fedllm.models.load import load_model
from fedllm.spaces.registry import make_space


@pytest.mark.parametrize("text, said", [
    ("It is longer. [[A]]", "first"), ("[[b]]", "second"), ("[[C]] ", "tie"), ("[[Tie]]", "tie"), ("[[ A ]]", "first"),
    ("[[A]] or [[B]]", None), ("A", None), ("", None), ("[[D]]", None), ("[A]", None), ("[[A]], yes [[A]]", "first")])
def test_a_verdict_is_one_and_no_other(text, said):
    assert verdict(text) == said


@pytest.mark.parametrize("straight, swapped, what", [
    ("first", "second", "wins"), ("second", "first", "losses"), ("first", "first", "inconsistent"),
    ("second", "second", "inconsistent"), ("tie", "tie", "ties"), ("first", "tie", "ties"), ("tie", "first", "ties"),
    (None, "first", "invalid"), ("tie", None, "invalid")])
def test_both_orders_make_an_outcome(straight, swapped, what):
    assert outcome(straight, swapped) == what


@pytest.fixture(scope="module")
def runs(tmp_path_factory, rows_file, tiny_llama_folder):
    """Two runs, and a file of four questions."""
    folder = tmp_path_factory.mktemp("duel")
    recipe = {"name": "one", "model": tiny_llama_folder, "rounds": 2, "local": {"lr": 0.03, "steps": 20},
              "data": {"source": rows_file, "partition": {"kind": "iid", "clients": 2}},
              "evaluate": {"max_new_tokens": 4, "samples": 0, "exact_match": False, "clients": False}}
    (folder / "asked.jsonl").write_text("".join(json.dumps(q) + "\n" for q in (
        {"question": "say the word red", "reference": "red"}, {"prompt": "say the word cat"},
        {"turns": ["say the word dog"]}, {"instruction": "say the word blue"})))
    return fedllm.run(recipe, root=folder), fedllm.run({**recipe, "name": "two", "seed": 1}, root=folder), folder


@contextmanager
def judging(say, wait=0.0):
    """A judge that says what `say` makes of the prompt."""
    class Judge(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer({"data": []}, 0.0)

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            heard.append((body, dict(self.headers)))
            self.answer({"choices": [{"message": {"content": say(body["messages"][0]["content"])}}],
                         "usage": {"prompt_tokens": 100, "completion_tokens": 7}}, wait)

        def answer(self, doc, wait):
            data = json.dumps(doc).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            try:
                for i in range(len(data) if wait else 1):
                    self.wfile.write(data[i : i + 1] if wait else data)
                    time.sleep(wait)
            except OSError:
                pass  # the asker has gone

        def log_message(self, *args):
            pass

    heard = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", heard
    finally:
        server.shutdown()
        server.server_close()


def asking(url, **more):
    return Endpoint(base_url=url, model="judge", api="chat", logprobs=False, retries=0, **more)


def test_a_judge_that_goes_by_the_answer_and_one_that_goes_by_place(runs):
    one, two, folder = runs
    data = str(folder / "asked.jsonl")
    with judging(lambda prompt: "fine [[A]]") as (url, heard):
        found, path = duel(one.folder, two.folder, data, asking(url), prices=(10.0, 100.0))
    assert (found.inconsistent, found.wins, found.losses, found.ties, found.invalid) == (4, 0, 0, 0, 0)
    assert found.win_rate == 0.5 and found.position == {"first": 8, "second": 0, "tie": 0}
    assert (found.calls, found.prompt_tokens, found.completion_tokens) == (8, 800, 56)
    assert found.cost == pytest.approx((800 * 10 + 56 * 100) / 1e6)
    kept = json.loads(path.read_text())
    assert kept["inconsistent"] == 4 and len(kept["rows"]) == 4 and "<reference>\nred\n" in "".join(
        body["messages"][0]["content"] for body, _ in heard)
    mine = {tuple(r["a"]) for r in kept["rows"]}

    def knows(prompt):
        first = prompt.split("<assistant>\n")[1].split("\n</assistant>")[0]
        return "[[A]]" if (first.replace("(no answer)", ""),) in mine else "[[B]]"

    with judging(knows) as (url, _):
        against = duel(one.folder, "base", data, asking(url))[0]
    same = sum(r["a"] == r["b"] for r in against.rows)
    assert against.wins == 4 - same and against.losses == 0 and against.wins > 0


def test_a_judgment_that_was_stopped_goes_on_where_it_was(runs):
    """One question's calls fail; the next time it alone is asked, and the sum is that of all."""
    one, two, folder = runs
    data, broken = str(folder / "asked.jsonl"), ["say the word dog"]

    def say(prompt):
        if any(word in prompt for word in broken):
            raise ConnectionError("the judge hangs up")
        return "[[A]]"

    with judging(say) as (url, heard):
        first, _ = duel(one.folder, two.folder, data, asking(url), name="stopped")
        kept = one.folder / "evaluations" / "stopped.judging.jsonl"
        assert (first.failed, first.inconsistent) == (1, 3) and kept.stat().st_mode & 0o077 == 0
        with open(kept, "a") as file:
            file.write('\n{"key": "cut sh')  # a kill in the middle of a line
        broken.clear()
        before = len(heard)
        whole, _ = duel(one.folder, two.folder, data, asking(url), name="stopped")
    assert (whole.failed, whole.inconsistent, whole.calls) == (0, 4, 8)
    assert len(heard) - before == 2 and not kept.exists()


def test_nonsense_of_a_real_model_is_no_tie(runs):
    """Our own server with the embedded model, which judges nothing: no verdict can be read, and none is made up."""
    one, two, folder = runs
    judge = LocalText(load_model("embedded", "generation", make_space("lora")))
    with serving(judge, "tiny") as server:
        words = ["judge", str(one.folder), str(two.folder), "--data", str(folder / "asked.jsonl"), "--endpoint",
                 server.base_url, "--model", "tiny", "--verdict-tokens", "24"]
        shown, line = (CliRunner().invoke(app, [*words, *more]) for more in ([], ["--json"]))
    assert shown.exit_code == 0 and "no verdict could be read" in shown.output
    said = json.loads(line.stdout.strip().splitlines()[-1])
    assert (said["invalid"], said["ties"], said["win_rate"], said["calls"]) == (4, 0, None, 8)
    assert said["completion_tokens"] > 0 and sum(said["position"].values()) == 0


def test_no_call_outlasts_its_deadline_and_failures_are_no_ties(runs):
    """A judge that sends a byte now and then is as late as one that sends none."""
    one, two, folder = runs
    with judging(lambda prompt: "[[A]]", wait=0.05) as (url, _):
        began = time.monotonic()
        with pytest.raises(EndpointError, match="answered nothing"):
            duel(one.folder, two.folder, str(folder / "asked.jsonl"), asking(url, timeout=1.5), limit=1)
        assert time.monotonic() - began < 30
    with pytest.raises(EndpointError):
        duel(one.folder, two.folder, str(folder / "asked.jsonl"), asking("http://127.0.0.1:9/v1", timeout=1.0))


def test_the_key_comes_from_the_environment_and_is_kept_nowhere(runs, monkeypatch):
    one, two, folder = runs
    monkeypatch.setenv("JUDGE_KEY", "sk-very-secret")
    with judging(lambda prompt: "[[C]]") as (url, heard):
        found, path = duel(one.folder, two.folder, str(folder / "asked.jsonl"), asking(url, api_key_env="JUDGE_KEY"))
    assert found.ties == 4 and heard[0][1]["Authorization"] == "Bearer sk-very-secret"
    assert "sk-very-secret" not in path.read_text()


def test_questions_that_are_none(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question": "a"}\n{"other": "b"}\n')
    with pytest.raises(DataError, match="row 2"):
        read_questions(str(tmp_path / "q.jsonl"))
    text = shown(Question(("q",)), ["is 1"], ["is 2"])
    assert text.index("is 1") < text.index("is 2") and "<reference>" not in text
