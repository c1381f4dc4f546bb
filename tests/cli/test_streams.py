"""What a process is started with ends no work: closed or full streams, signals of schedulers, folders that are none."""

import json
import os
import signal
import sys
import time

import pytest
import yaml

from fedllm.cli.main import main
from fedllm.runs.folder import RunFolder


def begun(folder, args, streams=()):
    """A process with `fedllm ARGS` in this folder: forked, since that loads nothing anew; `streams` maps 0, 1, 2 to a
    file that is opened in their place, None: closed. What is not named goes to `said`."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)  # who started these tests with nohup has them ignored
        os.chdir(folder)
        said = os.open("said", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(said, number)
        sys.stdout, sys.stderr = (open(n, "w", closefd=False) for n in (1, 2))  # noqa: SIM115
        for number, path in dict(streams).items():
            os.close(number)
            if path:
                os.dup2(os.open(path, os.O_WRONLY), number)
        code = _code(args)
        sys.stdout.flush()
    finally:
        os._exit(code)


def stopped():
    """Ctrl-C, which tests that run in the background would not hear."""
    raise KeyboardInterrupt


def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def small(recipe, tmp_path):
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({**recipe, "rounds": 1}))
    return tmp_path


def test_closed_and_full_streams_end_no_finished_run(small):
    """With a closed stream the next file that is opened would be the console."""
    said = lambda: " ".join((small / "said").read_text().split())  # noqa: E731
    for i, streams in enumerate(({0: None, 1: None, 2: None}, {1: "/dev/full"})):
        assert ended(begun(small, ["run", "small.yaml"], streams)) == 0, said()
        folder = small / "runs" / ("small" if not i else "small-2")
        assert (folder / "result.json").is_file()
        assert all(line.startswith(b"{") for line in (folder / "events.jsonl").read_bytes().splitlines())
    assert "the run is done, and what is said of it cannot be printed (No space left" in said()
    assert ended(begun(small, ["recipe", "--keys"], {1: "/dev/full"})) == 1
    assert "standard output cannot be written" in said() and "fault of fedllm" not in said()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_a_scheduler_sends_says_what_is_kept(recipe, tmp_path, number):
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({**recipe, "rounds": 500}))
    child = begun(tmp_path, ["run", "small.yaml"])
    ends = time.monotonic() + 90
    while not RunFolder(tmp_path / "runs" / "small").rounds()[1:] and time.monotonic() < ends:
        time.sleep(0.05)
    os.kill(child, number)
    assert ended(child) == 128 + number
    assert "`fedllm resume runs/small` goes on" in (tmp_path / "said").read_text()


def test_folders_that_are_none_are_told_by_name(small, capsys, monkeypatch):
    monkeypatch.chdir(small)
    main_of = lambda *args: _code(args)  # noqa: E731
    assert main_of("run", "small.yaml") == 0
    os.symlink("nowhere", small / "link")
    for args, said in [(("resume", "runs"), "runs has small"),
                       (("run", "runs/small"), "`fedllm resume runs/small` goes"),
                       (("chat", "runs/small/adapter"), "did you mean runs/small?"),
                       (("export", "runs/small", "--out", "small.yaml"), "small.yaml cannot be written into"),
                       (("export", "runs/small", "--out", "link"), "link cannot be written into"),
                       (("resume", "small.yaml"), "is no run folder")]:
        capsys.readouterr()
        assert main_of(*args) == 2
        assert said in " ".join(capsys.readouterr().err.replace("│", " ").split()), args
    os.symlink("/nowhere/x", small / "away")  # it was tried again without an end
    assert main_of("run", "small.yaml", "--root", "away") == 2
    assert "a link or a file stands on the way" in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert main_of("chat", "runs/small", "--temperature", "nan") == 2
    (small / "runs" / "small-2").write_text("a file")
    assert main_of("run", "small.yaml") == 0 and (small / "runs" / "small-3" / "result.json").is_file()


def test_a_product_that_the_disk_does_not_take_is_said_as_such(recipe, tmp_path, monkeypatch):
    """Safetensors has an error of its own for a full disk."""
    from safetensors import SafetensorError

    import fedllm
    from fedllm.core.errors import RunError

    with monkeypatch.context() as patch:
        patch.setattr("fedllm.runs.run.write_served", lambda *args: (_ for _ in ()).throw(
            SafetensorError("Error while serializing: I/O error: File too large")))
        with pytest.raises(RunError, match=r"cannot be written: .*File too large.*Make room, then `fedllm resume"):
            fedllm.run({**recipe, "rounds": 1}, root=tmp_path)
    assert fedllm.resume(tmp_path / "small").rounds == 1


def test_a_folder_that_is_gone_is_no_fault_of_ours(small):
    (small / "gone").mkdir()
    child = os.fork()
    if not child:
        os.chdir(small / "gone")
        os.rmdir(small / "gone")
        sys.stderr = open(small / "said", "w")  # noqa: SIM115
        os.dup2(sys.stderr.fileno(), 2)
        code = _code(["run", str(small / "small.yaml"), "--root", "runs"])
        sys.stderr.flush()
        os._exit(code)
    assert ended(child) == 2


def _code(args):
    try:
        main(list(args))
    except SystemExit as end:
        return end.code or 0
    return 0


@pytest.fixture
def rows_of_ones_own(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"q": f"say {w}", "a": w} for w in ("red", "green", "blue", "one", "two", "three", "cat", "dog")]
    for name in ("data", "test", "public"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return {**recipe, "rounds": 2, "data": {
        "source": "data.jsonl", "test": "test.jsonl", "public": "public.jsonl", "template": "plain",
        "fields": {"prompt": "q", "response": "a"}, "partition": {"kind": "iid", "clients": 2}}}


def test_a_recipe_that_was_edited_in_the_folder_is_not_gone_on_with(recipe, tmp_path):
    import fedllm
    from fedllm.core.errors import RunError

    folder = fedllm.run(recipe, root=tmp_path, rounds=1).folder
    text = (folder / "recipe.yaml").read_text()
    assert fedllm.resume(folder, rounds=2).rounds == 2 and fedllm.resume(folder, rounds=3).rounds == 3
    (folder / "result.json").unlink()
    (folder / "recipe.yaml").write_text(text.replace("lr: 0.02", "lr: 0.03"))
    with pytest.raises(RunError, match=r"has other local\.lr than the run began with"):
        fedllm.resume(folder)



@pytest.mark.parametrize("other, said", [
    ("data.jsonl", "rows of client 'client-0"), ("test.jsonl", "rows of the global test"),
    ("public.jsonl", "public rows"), ("model", "weights of the base model"), (None, None)])
def test_a_run_goes_on_with_what_it_began_with_or_not_at_all(rows_of_ones_own, tmp_path, tiny_llama_folder, other,
                                                             said):
    import shutil

    import torch
    from transformers import AutoModelForCausalLM

    import fedllm
    from fedllm.core.errors import RunError
    from fedllm.runs.course import Course

    shutil.copytree(tiny_llama_folder, tmp_path / "model")
    with pytest.MonkeyPatch.context() as patch:
        step = Course.step
        patch.setattr(Course, "step", lambda self, r: step(self, r) if r < 1 else stopped())
        with pytest.raises(KeyboardInterrupt):
            fedllm.run(rows_of_ones_own, root=tmp_path, model="model")
    folder = next(p.parent for p in tmp_path.glob("*/recipe.yaml"))
    if other == "model":
        net = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        with torch.no_grad():
            net.model.layers[0].mlp.up_proj.weight.mul_(1.01)
        net.save_pretrained(tmp_path / "model")
    elif other:
        text = (tmp_path / other).read_text()
        (tmp_path / other).write_text(text.replace("say blue", "say bank"))
    if other is None:
        assert fedllm.resume(folder).rounds == 2
        return
    before = (folder / "events.jsonl").read_bytes()
    with pytest.raises(RunError, match=f"began with other {said}.*bring back what it began with"):
        fedllm.resume(folder)
    assert (folder / "events.jsonl").read_bytes() == before


def test_a_run_of_relative_rows_says_where_it_was_begun(rows_of_ones_own, tmp_path, monkeypatch):
    import fedllm
    from fedllm.core.errors import DataError

    done = fedllm.run(rows_of_ones_own, root=tmp_path)
    (done.folder / "result.json").unlink()
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    with pytest.raises(DataError, match=f"The run was begun in {tmp_path}, where relative paths"):
        fedllm.resume(done.folder)


def test_an_adapter_of_a_narrow_checkpoint_is_merged_as_wide_as_it_was_trained(recipe, tmp_path, tiny_llama_folder):
    """In bf16 the adapter's change would be rounded away."""
    import shutil

    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import fedllm
    from fedllm.runs.export import export

    net = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.bfloat16)
    shutil.copytree(tiny_llama_folder, tmp_path / "narrow")
    net.save_pretrained(tmp_path / "narrow")
    done = fedllm.run({**recipe, "rounds": 1, "space": "lora"}, root=tmp_path, model=str(tmp_path / "narrow"))
    merged = AutoModelForCausalLM.from_pretrained(export(done.folder, tmp_path / "merged", merge=True), dtype="auto")
    over = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "narrow", dtype=torch.float32),
                                     str(done.folder / "adapter"))
    ids = torch.arange(4, 20)[None]
    assert merged.dtype == torch.float32
    assert (merged(ids).logits - over(ids).logits).abs().max() < 1e-5
