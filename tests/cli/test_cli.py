"""The command line as a new user meets it: never a traceback first."""

import json
import subprocess
import sys

import pytest

import fedllm
from fedllm.cli import main as cli


def call(capsys, *args):
    """Exit code, standard output, standard error."""
    code = 0
    try:
        cli.main(list(args))
    except SystemExit as end:
        code = end.code or 0
    out = capsys.readouterr()
    return code, " ".join(out.out.split()), " ".join(out.err.replace("│", " ").split())


@pytest.fixture
def file(recipe, tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return str(path)


def test_from_recipe_to_export(capsys, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(capsys, "run", file, "rounds=2", "record.replies=true")
    assert code == 0 and "federated" in out and "runs/small/report.html" in out
    assert call(capsys, "resume", "runs/small")[0] == 0
    code, out, _ = call(capsys, "replay", "runs/small")
    assert code == 0 and "bit for bit" in out
    assert "median" in call(capsys, "replay", "runs/small", "--reducer", "median")[1]
    assert "report.html" in call(capsys, "report", "runs/small")[1]
    assert call(capsys, "export", "runs/small", "--merge")[1].endswith("runs/small/merged")
    assert "exists and is not empty" in call(capsys, "export", "runs/small", "--merge")[2]
    monkeypatch.setattr(cli, "_lines", lambda: iter(["say the word red cat", "/base say the word red cat"]))
    code, out, _ = call(capsys, "chat", "runs/small", "--raw")
    assert code == 0 and "model>" in out and "base>" in out


def test_merged_and_adapter_give_the_same_logits(recipe, tmp_path):
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    run = fedllm.run(recipe, root=tmp_path, rounds=1)
    merged = AutoModelForCausalLM.from_pretrained(whole := fedllm.export(run.folder, merge=True)).eval()
    adapter = AutoPeftModelForCausalLM.from_pretrained(part := fedllm.export(run.folder)).eval()
    for folder, library, other in ((whole, "transformers", "peft"), (part, "peft", "transformers")):
        card = (folder / "README.md").read_text()
        assert f"\nlibrary_name: {library}\n" in card and f"from {library} import Auto" in card
        assert f"library_name: {other}" not in card and f"from {other} import" not in card
        assert "PATH/OF/THIS/FOLDER" in card and "## Results" in card
    ids = torch.tensor([[1, 5, 8, 9]])
    with torch.no_grad():
        assert torch.allclose(merged(input_ids=ids).logits, adapter(input_ids=ids).logits, atol=1e-5)


def test_the_demo_shows_all_four(file, tmp_path):
    from pathlib import Path

    from rich.console import Console

    from fedllm.cli.demo import demo

    console = Console(record=True, width=160)
    recipe = json.loads(Path(file).read_text())
    recipe["evaluate"]["baselines"] = ["local_only", "centralized"]
    Path(file).write_text(json.dumps(recipe))
    demo(console, tmp_path / "runs", Path(file))
    text = console.export_text()
    for said in ("before", "local only", "federated", "centralized", "expected", "adapter", "report.html", "client-00"):
        assert said in text


def test_methods(capsys):
    code, out, _ = call(capsys, "methods")
    assert code == 0 and "fedavg" in out and "scaffold" in out
    code, out, _ = call(capsys, "methods", "fedavg")
    assert code == 0 and "fedavg.py" in out and "server_lr" in out and "> 0" in out and "claim" in out


@pytest.mark.parametrize(("args", "says"), [
    (["methods", "fedvag"], "did you mean 'fedavg'"),
    (["rnu"], "did you mean 'run'"),
    (["run", "none.yaml"], "cannot be read"),
    (["resume", "none"], "is no run folder"),
    (["export", "none"], "is no run folder"),
    (["replay", "none"], "is no run folder"),
])
def test_mistakes_are_one_panel(capsys, args, says):
    code, _, err = call(capsys, *args)
    assert code == 2 and says in err and "Traceback" not in err


@pytest.mark.parametrize(("override", "says"), [
    ("local.lrr=1", "local.lrr: unknown key; did you mean 'lr'"),
    ("local.lr=-1", "local.lr = -1 is not allowed; it must be > 0"),
    ("method.server_lr=0", "method.server_lr = 0 is not allowed; it must be > 0"),
    ("method.sever_lr=1", "method.sever_lr: unknown key; did you mean 'server_lr'"),
    ("space.rank=0", "space.rank = 0 is not allowed"),
    ("space=lroa", "space.name = 'lroa' is unknown; did you mean 'lora'"),
    ("layers=[clpi]", "layers.0.name = 'clpi' is unknown"),
    ("space={name: lora, targets: [q_prj]}", "no linear modules named ('q_prj',)"),
    ("model=nowhere/none", "cannot be loaded"),
    ("data.fields={prompt: question}", "has no field 'question'"),
    ("space={name: lora, start_from: /none}", "no PEFT adapter folder"),
])
def test_bad_recipes_are_refused_before_any_work(capsys, file, tmp_path, override, says):
    code, _, err = call(capsys, "run", file, "--root", str(tmp_path / "runs"), override)
    assert code == 2 and " ".join(says.split()) in err, err
    assert not (tmp_path / "runs").exists()


def test_a_fault_of_ours_is_no_traceback_either(capsys, monkeypatch):
    def broken(console, names):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("fedllm.cli.tables.show_methods", broken)
    code, _, err = call(capsys, "methods")
    assert code == 1 and "fault of fedllm" in err
    with pytest.raises(ZeroDivisionError):
        cli.main(["methods", "--debug"])


def test_importing_is_light():
    """`import fedllm` and its errors cost no torch."""
    code = "import sys, fedllm; assert 'torch' not in sys.modules; fedllm.FedLLMError; print(fedllm.__version__)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
    assert told == fedllm.__version__


def test_the_public_face_is_complete():
    for name in fedllm.__all__:
        assert getattr(fedllm, name) is not None


@pytest.mark.parametrize("module", ["cli.main", "cli.federate", "federation.nvflare.join", "federation.flower.join"])
def test_what_only_begins_or_watches_is_light(module):
    """Help is there at once; `join` lives as long as the site does: the model's packages are the watched process's."""
    code = f"import sys, fedllm.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
