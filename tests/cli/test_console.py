"""What people see: consoles that lack characters, Ctrl-C, progress lines, hints, keys, chat, run folders."""

import io
import json
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from rich.console import Console

import fedllm
from fedllm.cli.chat import Speaker, chat
from fedllm.core.errors import RecipeError, RunError
from fedllm.local.spec import LocalSpec
from fedllm.runs.event_log import EventLog
from fedllm.runs.folder import RunFolder
from fedllm.runs.keys import page
from fedllm.runs.products import safe
from fedllm.runs.progress import Lines, clock
from fedllm.runs.result import Result

ROOT = Path(__file__).resolve().parents[2]


def command(*args, cwd, **more):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **more.pop("env", {})}
    return subprocess.Popen([sys.executable, "-m", "fedllm.cli.main", *args], cwd=cwd, env=env, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, stdin=subprocess.PIPE, preexec_fn=hears_ctrl_c, **more)


def hears_ctrl_c():
    """A shell that started these tests in the background has them, and their children, ignore it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def small(recipe, tmp_path):
    """The recipe as a file, with an emoji in its answers and brackets in its folder's name."""
    folder = tmp_path / "work [old] [" / "b]"
    folder.mkdir(parents=True)
    rows = [{"prompt": "say the word red \U0001f600", "response": "red \U0001f600"} for _ in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    made = {**recipe, "rounds": 1, "data": {**recipe["data"], "source": "rows.jsonl"}}
    (folder / "small.yaml").write_text(yaml.safe_dump(made))
    return folder


@pytest.mark.slow
def test_a_console_without_the_character_and_brackets_in_a_path_end_no_finished_run(small):
    """One run on a cp1252 console, without a terminal, in a folder whose path looks like markup; then a talk."""
    ran = command("run", "small.yaml", cwd=small, env={"PYTHONIOENCODING": "cp1252"})
    out, err = ran.communicate(timeout=100)
    assert ran.returncode == 0, err
    assert b"round 1 of 1" in err and b"testing" in err
    report = command("report", str(small / "runs" / "small"), cwd=small)
    assert b"[/b]" in report.communicate(timeout=100)[0]
    talk = command("chat", str(small / "runs" / "small"), cwd=small, env={"PYTHONIOENCODING": "utf-8"})
    out, err = talk.communicate(b"caf\xe9 red\n", timeout=100)
    assert talk.returncode == 0 and b"[/b]" in out and b"model>" in out, err


@pytest.mark.slow
def test_ctrl_c_says_what_was_kept_and_how_to_go_on(small):
    run = command("run", "small.yaml", "rounds=10000", cwd=small)
    for line in run.stderr:  # the run's own lines: it has begun
        if b"round 2 of" in line:
            break
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130
    said = " ".join(err.decode().split())
    assert "of 10000 rounds are kept in runs/small; `fedllm resume runs/small` goes on" in said


def test_progress_lines_say_rounds_loss_and_the_time_left(caplog):
    caplog.set_level(logging.INFO, "fedllm.progress")
    lines = Lines(every=0.0)
    lines.rounds(4, 1)
    lines.round(1, 3, steps=6)
    lines.began, lines.since = time.monotonic() - 60, time.monotonic() - 2
    lines.worked(3, 500)
    lines.saw({"kind": "wire", "direction": "up", "client": "a"})
    lines.saw({"kind": "missing", "client": "b"})
    lines.round_done({"loss": 1.5, "cohort": ["a", "b", "c"]})
    lines.round(2, 3, steps=6)
    lines.round_done({"skipped": "too few answers"})
    lines.tested(3, {"loss": 1.25, "n": 4})
    assert caplog.messages == [
        "round 2 of 4 begins with 3 clients",
        "round 2 of 4: step 3 of about 6, 0 of 3 clients answered, 250 tokens/s",
        "round 2 of 4: step 3 of about 6, 1 of 3 clients answered, 250 tokens/s",
        "round 2 of 4: step 3 of about 6, 1 of 3 clients answered, 1 missing, 250 tokens/s",
        "round 2 of 4 is done; training loss 1.500; 1 of 3 clients answered, 1 missing, 250 tokens/s; 0:02:00 left",
        "round 3 of 4 is done; skipped: too few answers; 0 of 3 clients answered; 0:00:30 left",
        "test after round 3: loss 1.250"]
    assert clock(None) == "" and clock(7200) == "2:00:00 left"


def test_a_run_in_json_lines_is_what_the_page_says(recipe, tmp_path):
    """Every line one object, of the events and fields of docs/reference/progress.md; steps are seen in the rounds."""
    from typer.testing import CliRunner

    from fedllm.cli.main import app

    (tmp_path / "small.yaml").write_text(yaml.safe_dump({**recipe, "rounds": 2, "local": {"lr": 0.02, "steps": 2}}))
    done = CliRunner().invoke(app, ["run", str(tmp_path / "small.yaml"), "--root", str(tmp_path), "--json"])
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    page = (Path(__file__).parents[2] / "docs" / "reference" / "progress.md").read_text()
    fields = {name: set(said.split(", ")) for name, said in re.findall(r"^\| `(\w+)` \| ([\w, ]+) \|", page, re.M)}
    for line in lines:
        if line["event"] != "result":
            assert line.keys() - {"event"} == fields[line["event"]], line
    rounds = [line for line in lines if line["event"] == "round"]
    assert [r["round"] for r in rounds] == [1, 2] and rounds[0]["seconds_left"] > 0
    assert rounds[1]["seconds_left"] is None
    assert all(r["steps"] == 6 == r["steps_expected"] and r["answered"] == r["clients"] == 3 for r in rounds)
    assert all(r["tokens_per_second"] > 0 for r in rounds)
    assert [t["round"] for t in lines if t["event"] == "test"] == [0, 2] and lines[-1]["event"] == "result"
    assert lines[-1]["state_digest"] == json.loads((tmp_path / "small" / "result.json").read_text())["state_digest"]
    many = CliRunner().invoke(app, ["methods", "fedavg", "--json"])
    assert json.loads(many.stdout)["id"] == "fedavg" and "knobs" in json.loads(many.stdout)


@pytest.mark.parametrize("change, said", [
    ({"local": {"learning_rate": 1e-3}}, "local.learning_rate: unknown key; here it is 'lr'. Allowed here: optimizer"),
    ({"learning_rate": 1e-3}, "learning_rate: unknown key; here it is 'local.lr'. Allowed here: name"),
    ({"local": {"per_device_train_batch_size": 2}}, "here it is 'batch_size'."),
    ({"local": {"gradient_accumulation_steps": 2}}, "here it is 'accumulate'."),
    ({"local": {"gradient_checkpointing": True}}, "here it is 'checkpointing'."),
    ({"local": {"neftune_noise_alpha": 5}}, "here it is 'neftune'."),
    ({"space": {"lora_dropout": 0.1}}, "here it is 'dropout'."),
    ({"space": {"use_rslora": True}}, "here it is 'scaling: rslora'."),
    ({"early_stopping_patience": 3}, "here it is 'evaluate.patience'."),
    ({"local": {"num_train_epochs": 2}}, "here it is 'epochs (of a round)'."),
    ({"max_seq_length": 64}, "here it is 'local.max_length'."),
    ({"space": {"r": 8}}, "here it is 'rank'."),
    ({"local": {"zzz": 1}}, "local.zzz: unknown key. Allowed here"),
    ({"zzz": 1}, "zzz: unknown key. Allowed here"),
    ({"rouns": 1}, "rouns: unknown key; did you mean 'rounds'? Allowed here"),
])
def test_keys_of_other_tools_are_known_by_name(recipe, change, said):
    with pytest.raises(RecipeError) as caught:
        fedllm.run({**recipe, **change}, root="/nonexistent")
    assert said in str(caught.value)


def test_options_are_read_in_any_case():
    assert LocalSpec.make({"optimizer": "AdamW", "schedule": "Cosine"}, "local") == LocalSpec(
        optimizer="adamw", schedule="cosine")
    with pytest.raises(RecipeError, match="optimizer = 'Adagrad' is not allowed"):
        LocalSpec.make({"optimizer": "Adagrad"}, "local")


def test_the_page_of_keys_is_what_the_recipe_checks():
    """docs/recipe.md is `fedllm recipe --keys`; every key has a meaning."""
    assert (ROOT / "docs" / "recipe.md").read_text() == page()
    for key in ("engine.batch_tokens", "local.beta1", "evaluate.max_new_tokens", "local.schedule", "data.empty"):
        assert f"| `{key}` |" in page()
    assert "| `data.client_test` | number, >= 0, < 1 |" in page() and "| `local.lr` | float, > 0 |" in page()
    rows = [line for line in page().splitlines() if line.startswith("| `")]
    assert len(rows) > 80 and not [line for line in rows if line.split(" | ")[-1].strip(" |") == ""]


@pytest.fixture
def done(recipe, tmp_path):
    return fedllm.run(recipe, root=tmp_path / "runs", rounds=1, data={"template": "Animal of {prompt}, please: "})


class Said:
    """Stands in for what is typed."""

    def __init__(self, *lines):
        self.lines = lines

    def __call__(self):
        return iter(self.lines)


def test_chat_sends_what_is_typed_in_the_recipes_frame(done, capsys):
    speaker = Speaker(done.folder)
    assert speaker.framed("red cat") == "Animal of red cat, please: "
    asked = []
    say = Speaker.say
    Speaker.say = lambda self, text, **how: asked.append((text, how["max_new_tokens"])) or say(self, text, **how)
    try:
        chat(done.folder, Console(), Said("red", "/base red"), temperature=0.0, raw=False, max_new_tokens=2)
        chat(done.folder, Console(), Said("red"), temperature=0.0, raw=True)
    finally:
        Speaker.say = say
    assert asked == [("Animal of red, please: ", 2), ("Animal of red, please: ", 2), ("red", None)]


def test_chat_on_conversations_gives_the_model_all_that_was_said(recipe, tmp_path, tiny_llama_folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "talker"
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder)
    tokenizer.chat_template = ("{% for m in messages %}{{ m['content'] + ' the ' }}{% endfor %}"
                               "{% if add_generation_prompt %}{{ 'say ' }}{% endif %}")
    tokenizer.save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(tiny_llama_folder).save_pretrained(folder)
    done = fedllm.run(recipe, root=tmp_path / "runs", rounds=1, model=str(folder), data={"template": "chat"})
    heard = []
    go_on = Speaker._go_on
    Speaker._go_on = lambda self, ids, *how: heard.append(self.model.tokenizer.decode(ids[0])) or "cat"
    try:
        chat(done.folder, Console(), Said("red", "/base blue", "green", "/new", "one"), temperature=0.0, raw=False)
    finally:
        Speaker._go_on = go_on
    assert heard == ["red the say", "red the cat the blue the say", "red the cat the green the say", "one the say"]


def test_a_result_of_another_version_is_read_or_refused_by_name(done):
    path = done.folder / "result.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps({**said, "a_later_key": 1}))
    assert Result.load(done.folder).state_digest == done.state_digest
    path.write_text(json.dumps({k: v for k, v in said.items() if k != "reports"}))
    assert Result.load(done.folder).reports == {}
    for broken in ({k: v for k, v in said.items() if k != "state_digest"}, [said]):
        path.write_text(json.dumps(broken))
        with pytest.raises(RunError, match=r"result\.json lacks .*state_digest.*version"):
            Result.load(done.folder)


@pytest.mark.parametrize("harm, said", [
    (lambda data: data[:-40], "is damaged: it has"),
    (lambda data: data[:200] + b"\0" * (len(data) - 200), "is damaged on line"),
    (lambda data: b"\0" * len(data), "is damaged on line 1"),
])
def test_a_record_that_a_power_cut_has_damaged_is_refused_before_any_work(done, harm, said):
    path = done.folder / "events.jsonl"
    data = path.read_bytes()
    path.write_bytes(harm(data))
    with pytest.raises(RunError, match=said):
        EventLog(path, len(data))
    if b"\0" in path.read_bytes():
        with pytest.raises(RunError, match=r"damaged on line .*audit verify"):
            RunFolder(done.folder).events()


def _start(root, gate, names):
    gate.wait()
    names.put(RunFolder.fresh(root, "same", {"name": "same"}).path.name)


def test_many_runs_that_start_at_once_get_a_name_each(tmp_path):
    context = multiprocessing.get_context("fork")
    gate, names = context.Barrier(8), context.Queue()
    all_of_them = [context.Process(target=_start, args=(tmp_path, gate, names)) for _ in range(8)]
    for p in all_of_them:
        p.start()
    got = {names.get(timeout=30) for _ in all_of_them}
    for p in all_of_them:
        p.join(30)
    assert got == {"same", *(f"same-{i}" for i in range(2, 9))}


def test_the_folder_of_a_client_has_a_name_that_a_disk_takes():
    a, b = safe("x" * 400), safe("x" * 399 + "y")
    assert a != b and len(a.encode()) < 255 and len(safe("é" * 300).encode()) < 255 and safe("ward~2") == "ward~2"


@pytest.mark.parametrize("args, said", [(["--data", "nope.jsonl"], "no such file or folder"),
                                        (["--data", ".", "--allow", "fedavgg"], "did you mean 'fedavg'")])
def test_join_refuses_what_is_not_there_at_once(capsys, args, said):
    from fedllm.cli.main import main

    with pytest.raises(SystemExit) as end:
        main(["join", "localhost:1", *args])
    assert end.value.code == 2 and said in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_a_run_of_a_relative_model_can_be_used_from_any_folder(recipe, tmp_path, tiny_llama_folder, monkeypatch):
    (tmp_path / "mine").symlink_to(tiny_llama_folder)
    monkeypatch.chdir(tmp_path)
    done = fedllm.run(recipe, root=tmp_path / "runs", rounds=1, model="mine")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert Speaker(done.folder).say("red", max_new_tokens=1) is not None
    config = json.loads((done.folder / "adapter" / "adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]).is_dir()


def test_no_empty_table_where_nothing_was_tested(tmp_path):
    from fedllm.cli.tables import show_result

    result = Result(tmp_path, "fedavg", "vectorized", 3, 0, {"before": {}, "global": None, "clients": {}},
                    {"up": 1, "down": 1}, 1.0, 1, "d")
    console = Console(record=True, width=120)
    show_result(console, result)
    assert "fedavg, 3 rounds: no test was given" in console.export_text()


def test_the_live_view_tells_what_bars_do_not(tmp_path, recipe, monkeypatch):
    """On a terminal: clients with what they sent, the loss by rounds, who was lost. Elsewhere it is refused."""
    from fedllm.runs.stages import begin
    from fedllm.runs.terminal import live_view, spark

    screen = io.StringIO()
    with live_view(Console(file=screen, force_terminal=True, width=100, height=40)) as view:
        begin({**recipe, "rounds": 3, "clients": {"dropout": 0.4}}, tmp_path, {}, lambda folder, result: None, view)
    last = Console(width=100, record=True, file=io.StringIO())
    last.print(view)
    text = last.export_text()
    assert "3 of 3" in text and "training loss" in text and "test after round 3" in text and "kB up" in text
    assert all(name in text for name in view.story.clients) and "lost while it worked" in text
    assert "training loss" in screen.getvalue()  # it was drawn while the run went on
    assert spark([3.0, 2.0, 1.0]) == "█▅▁" and spark([1.0]) == "▁"
    with pytest.raises(RecipeError, match="--live draws on a terminal"), live_view(Console(file=io.StringIO())):
        pass
