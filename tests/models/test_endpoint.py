"""Text models: over real HTTP an endpoint answers as the model behind it; its failures are clear and keep the key."""

import contextlib
import json
import logging
import socket
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from evidence.rigs.text import untrained
from fedllm.cli.serve_model import Handler, serving
from fedllm.core.errors import EndpointError, FedLLMError, RecipeError
from fedllm.federation.process import free_port
from fedllm.local.text import LocalText, as_text
from fedllm.models import bounded
from fedllm.models.endpoint import Completion, Endpoint, total_logprob
from fedllm.models.load import load_model
from fedllm.spaces import make_space
from tests.conftest import PLACE

PROMPTS = ["Q: Tom has 3 apples and buys 4 more. He eats 2. How many apples are left?", "Count the apples of Tom", "Q:"]
KEY = "sk-a-very-secret-key-0123456789"
NAME = "FEDLLM_TEST_KEY"
QUICK = {"backoff": 0.01, "timeout": 60.0, "retries": 1}


@pytest.fixture(scope="module")
def local():
    torch.set_num_threads(1)
    return LocalText(untrained(0, width=32))


@pytest.fixture(scope="module")
def server(local):
    with serving(local, "tiny") as running:
        yield running


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv(NAME, KEY)


@contextlib.contextmanager
def scripted(*answers):
    """A server that gives these (status, body) in turn, the last one for ever; yields its URL and what it was asked."""
    left, asked = list(answers), []

    class Script(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append((dict(self.headers), json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            status, body = left.pop(0) if len(left) > 1 else left[0]
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    httpd = HTTPServer(("127.0.0.1", 0), Script)
    threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}/v1", asked
    finally:
        httpd.shutdown()
        httpd.server_close()


def good(text="7"):
    doc = {"choices": [{"text": text}], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}
    return 200, json.dumps(doc).encode()


def complain(url, **options):
    """The error of one question, as text with its whole traceback."""
    with pytest.raises(EndpointError) as caught:
        Endpoint(url, "m", **{**QUICK, **options}).complete(["2 + 2 ="], 4)
    return str(caught.value), "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("api", ["completions", "chat"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_endpoint_says_what_the_model_behind_it_says(local, server, api, temperature):
    far = Endpoint(server.base_url, "tiny", api=api).complete(PROMPTS, 8, temperature, seed=5)
    near = local.complete(PROMPTS, 8, temperature, seed=5)
    assert [c.text for c in far] == [c.text for c in near]
    apart = 1e-4 if PLACE.type == "cpu" else 3e-4
    assert [c.logprob for c in far] == pytest.approx([c.logprob for c in near], abs=apart)
    assert [(c.prompt_tokens, c.completion_tokens) for c in far] == [
        (c.prompt_tokens, c.completion_tokens) for c in near]
    assert any(c.text for c in near)


def test_a_seed_fixes_what_is_sampled(local):
    assert local.complete(PROMPTS, 8, 1.0, seed=5) == local.complete(PROMPTS, 8, 1.0, seed=5)
    assert local.complete(PROMPTS, 8, 1.0, seed=5) != local.complete(PROMPTS, 8, 1.0, seed=6)


def test_the_logprob_is_the_sum_over_the_answers_tokens(local):
    [said] = local.complete(PROMPTS[:1], 6)
    tokenizer, net = local.model.tokenizer, local.model.net
    prompt = [tokenizer.bos_token_id, *tokenizer(PROMPTS[0])["input_ids"]]
    with torch.no_grad(), local.model.using([{}]):
        ids, total = list(prompt), 0.0
        for _ in range(said.completion_tokens):
            z = torch.log_softmax(net(input_ids=torch.tensor([ids])).logits[0, -1], -1)
            total += float(z.max())
            ids.append(int(z.argmax()))
    assert said.logprob == pytest.approx(total, abs=1e-3)
    assert said.prompt_tokens == len(prompt)


def test_the_ledger_adds_up(local, server):
    far = Endpoint(server.base_url, "tiny")
    said = [*far.complete(PROMPTS, 4), *far.complete(PROMPTS[:1], 4)]
    assert (far.usage.calls, far.usage.prompt_tokens, far.usage.completion_tokens) == (
        4, sum(c.prompt_tokens for c in said), sum(c.completion_tokens for c in said))


def test_no_prompts_are_no_questions(local):
    assert local.complete([], 4) == []
    assert Endpoint("http://127.0.0.1:9/v1").complete([], 4) == []


def test_a_model_becomes_a_text_model_and_a_text_model_stays(local):
    assert as_text(local) is local
    assert as_text(local.model).complete(PROMPTS, 4) == local.complete(PROMPTS, 4)


@pytest.mark.parametrize("space", ["lora", "soft_prompt", "prefix", "full"])
def test_the_bare_base_is_served_whatever_the_space(tiny_llama_folder, space):
    model = load_model(tiny_llama_folder, "generation", make_space(space), device="cpu")
    bare = LocalText(model).complete(["the cat is", "red"], 4)
    ids = torch.tensor([[1, *model.tokenizer("the cat is")["input_ids"]]])
    wanted = AutoModelForCausalLM.from_pretrained(tiny_llama_folder).generate(ids, max_new_tokens=4, do_sample=False)
    assert bare[0].text == model.tokenizer.decode(wanted[0, ids.shape[1] :], skip_special_tokens=True)
    theta = {k: v + 0.5 for k, v in model.initial().items()}
    assert LocalText(model, theta).complete(["the cat is"], 4)[0].logprob != bare[0].logprob


def test_an_answer_longer_than_the_context_is_refused(local):
    with pytest.raises(RecipeError, match="leaves no room"):
        local.complete(PROMPTS, 512)


def test_nobody_there():
    url = f"http://127.0.0.1:{free_port()}/v1"
    said, _ = complain(url)
    assert url in said and "ConnectError" in said and "2 attempts" in said


def test_silence_is_a_timeout():
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        said, _ = complain(f"http://127.0.0.1:{mute.getsockname()[1]}/v1", timeout=0.1)
    assert "no answer within 0.1 s" in said and "2 attempts" in said


def dripping(line):
    """Headers, a byte now and then, for ever."""
    line.sendall(b"HTTP/1.1 200 OK\r\n")
    with contextlib.suppress(OSError):
        while True:
            line.sendall(b"X: y\r\n")
            time.sleep(0.02)


def endless(line):
    line.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
    with contextlib.suppress(OSError):
        while True:
            line.sendall(b"x" * (1 << 20))


def unpacked(line):
    line.sendall(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 5\r\n\r\nhello")


@pytest.mark.parametrize(("say", "said", "asked"), [
    (dripping, "no answer within 0.3 s (2 attempts)", 2), (endless, "the answer is longer than 1 MiB", 1),
    (unpacked, "DecodingError", 2)])
def test_an_answer_that_does_not_end_or_is_none(say, said, asked, monkeypatch):
    """Whatever stands there has so many seconds and so many bytes; a proxy of the environment is not asked for it."""
    monkeypatch.setattr(bounded, "LARGEST", 1 << 20)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    lines = []
    with socket.create_server(("127.0.0.1", 0)) as there:
        def serve():
            with contextlib.suppress(OSError):
                while True:
                    lines.append(there.accept()[0])
                    lines[-1].recv(65536)
                    threading.Thread(target=say, args=(lines[-1],), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        began = time.monotonic()
        assert said in complain(f"http://127.0.0.1:{there.getsockname()[1]}/v1", timeout=0.3)[0]
        assert len(lines) == asked and time.monotonic() - began < 5
    for line in lines:
        line.close()


def test_overload_is_asked_again_and_a_refusal_is_not():
    with scripted((503, b"busy"), good()) as (url, asked):
        [said] = Endpoint(url, "m", **QUICK).complete(["2 + 2 ="], 4)
        assert said == Completion("7", None, 3, 1) and len(asked) == 2
    with scripted((503, b"busy")) as (url, asked):
        assert "HTTP 503: busy (2 attempts)" in complain(url)[0] and len(asked) == 2
    with scripted((404, b'{"error": {"message": "no such model"}}')) as (url, asked):
        assert "HTTP 404: no such model" in complain(url)[0] and len(asked) == 1


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}", b'{"choices": []}', b'{"choices": [{"text": null}]}',
                                  b'{"choices": [{"text": "5", "logprobs": 3}]}', b"[" * 100_000,
                                  b'{"choices": [{"text": "5"}], "usage": {"prompt_tokens": -1}}',
                                  b'{"choices": [{"text": "5"}], "usage": {"prompt_tokens": 1e999}}',
                                  b'{"choices": [{"text": "5", "logprobs": {"token_logprobs": [NaN]}}]}',
                                  b'{"choices": [{"text": "' + b"la " * 2000 + b'"}]}'])
def test_an_answer_of_another_shape_is_named(body):
    with scripted((200, body)) as (url, _):
        assert "not what the API promises" in complain(url)[0]


def test_half_a_character_is_marked():
    """JSON can hold halves of characters, which no encoding of text can."""
    with scripted((200, b'{"choices": [{"text": "a \\ud83d b \\ud83d\\ude00"}]}')) as (url, _):
        assert Endpoint(url, "m", **QUICK).complete(["x"], 4)[0].text == "a \ufffd b \U0001f600"


@pytest.mark.parametrize("answer", [(401, f'{{"error": {{"message": "bad key {KEY}"}}}}'.encode()),
                                    (500, f"trace: Bearer {KEY}".encode()), (200, f"<html>{KEY}".encode())])
def test_the_key_is_sent_and_never_shown(key, caplog, answer):
    caplog.set_level(logging.DEBUG)
    with scripted(answer) as (url, asked):
        said, trace = complain(url, api_key_env=NAME)
        assert asked[0][0]["Authorization"] == f"Bearer {KEY}"
        assert KEY not in json.dumps([body for _, body in asked])
        far = Endpoint(url, "m", api_key_env=NAME)
        far.usage.book([])
    assert KEY not in said + trace + repr(far) + str(vars(far)) + caplog.text


def test_a_key_that_no_header_can_hold_is_not_shown_either(monkeypatch):
    for wrong in (f"{KEY}\nX: y", f"{KEY}é"):
        monkeypatch.setenv(NAME, wrong)
        with scripted(good()) as (url, asked):
            said, trace = complain(url, api_key_env=NAME)
        assert "no HTTP header can carry" in said and KEY not in said + trace and not asked


def test_a_key_given_in_place_of_its_name_is_refused_unread(monkeypatch):
    for wrong in (KEY, "gsk_looks_like_a_name"):
        with pytest.raises(RecipeError, match="NAME of an environment variable") as caught:
            Endpoint(api_key_env=wrong)
        assert wrong not in str(caught.value)
    with pytest.raises(RecipeError, match="must not hold a user") as caught:
        Endpoint(f"http://user:{KEY}@host/v1")
    assert KEY not in str(caught.value)
    monkeypatch.delenv(NAME, raising=False)
    assert f"{NAME} is not set" in complain("http://127.0.0.1:9/v1", api_key_env=NAME)[0]


@pytest.mark.parametrize("bad", [{"base_url": "localhost:8000"}, {"timeout": 0}, {"retries": 99}, {"api": "soap"}])
def test_knobs_are_checked(bad):
    with pytest.raises(RecipeError):
        Endpoint(**bad)


def test_the_server_asks_for_its_key(local, key):
    with serving(local, api_key_env=NAME) as server:
        assert Endpoint(server.base_url, api_key_env=NAME).complete(["Q:"], 2)
        assert "HTTP 401" in complain(server.base_url)[0]


@pytest.mark.parametrize(("path", "body", "status"), [
    ("/v1/completions", b"{", 400), ("/v1/completions", b"[]", 400), ("/v1/completions", b"{}", 400),
    ("/v1/completions", b'{"prompt": "a", "stream": true}', 400), ("/v1/embeddings", b"{}", 404),
    ("/v1/completions", b'{"prompt": "a", "max_tokens": "many"}', 400), ("/v1/chat/completions", b"{}", 400),
    ("/v1/completions", b'{"prompt": "a", "max_tokens": 100000}', 400),
    ("/v1/chat/completions", b'{"messages": [{"role": "user"}]}', 400)])
def test_the_server_refuses_in_the_apis_own_shape(server, path, body, status):
    answer = httpx.post(server.base_url.removesuffix("/v1") + path, content=body)
    assert answer.status_code == status and answer.json()["error"]["message"]


@pytest.mark.parametrize(("length", "status"), [("100", 408), ("-1", 400), ("many", 400), ("9" * 5000, 400)])
def test_a_body_that_never_comes_is_not_waited_for(server, monkeypatch, length, status):
    monkeypatch.setattr(Handler, "timeout", 1.0)
    with socket.create_connection(server.server_address, timeout=60) as line:
        line.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n{{".encode())
        assert line.recv(4096).startswith(f"HTTP/1.1 {status} ".encode())


def test_the_server_lists_its_model_and_takes_many_prompts(server, local):
    assert server.base_url.startswith("http://127.0.0.1:")
    assert httpx.get(server.base_url + "/models").json()["data"][0]["id"] == "tiny"
    assert httpx.get(server.base_url.replace("/v1", "/health")).status_code == 200
    doc = httpx.post(server.base_url + "/completions", json={"prompt": PROMPTS, "max_tokens": 4}).json()
    assert [c["text"] for c in doc["choices"]] == [c.text for c in local.complete(PROMPTS, 4)]


def test_log_probabilities_of_both_interfaces():
    assert total_logprob(None) is None and total_logprob({}) is None
    assert total_logprob({"token_logprobs": [None, -1.0, -0.5]}) == -1.5
    assert total_logprob({"content": [{"logprob": -1.0}, {"logprob": -2.0}]}) == -3.0


def test_endpoint_errors_are_fedllms():
    assert issubclass(EndpointError, FedLLMError)
