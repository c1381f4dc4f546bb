"""A run's record holds what the run wrote: any line that is touched is found, also after a kill and a resume."""

import json

import pytest

import fedllm
from fedllm.core.errors import RunError
from fedllm.runs.event_log import CHAIN, EventLog, link
from fedllm.runs.folder import RunFolder
from fedllm.runs.seal import verify
from tests.cli.test_cli import call
from tests.dying import killed


@pytest.fixture(scope="module")
def folder(tmp_path_factory, rows_file, tiny_llama_folder):
    recipe = {"name": "small", "model": tiny_llama_folder, "rounds": 2, "local": {"lr": 0.02},
              "data": {"source": rows_file, "partition": {"kind": "iid", "clients": 5}, "client_test": 0.2},
              "evaluate": {"max_new_tokens": 2, "samples": 1}, "layers": ["secagg"]}
    return fedllm.run(recipe, root=tmp_path_factory.mktemp("runs")).folder


@pytest.fixture
def run(folder, tmp_path):
    """A copy to be spoiled."""
    import shutil

    return shutil.copytree(folder, tmp_path / "run")


def test_a_run_is_intact_and_its_head_is_in_the_result(run, capsys):
    found = verify(run)
    kept = json.loads((run / "result.json").read_text())["audit"]
    assert found.intact and found.finished and (found.events, found.head) == (kept["events"], kept["head"])
    code, out, _ = call(capsys, "audit", "verify", str(run))
    assert code == 0 and "intact" in out and kept["head"] in out
    assert call(capsys, "audit", "verify", str(run), "--head", kept["head"])[0] == 0
    code, out, _ = call(capsys, "audit", "verify", str(run), "--head", "00")
    assert code == 1 and "you kept 00" in out
    assert "chain" not in RunFolder(run).events()[0]  # readers see events as they were told


def test_every_single_line_counts(run):
    """Each line edited, each dropped, and each two neighbors swapped: found every time, at the right place."""
    log = run / "events.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    for i, line in enumerate(lines):
        body, _, said = line.rpartition(CHAIN)
        edited = body.replace('"round":', '"round":1', 1) if '"round":' in body else body.replace(":", ":0", 1)
        log.write_text("".join([*lines[:i], edited + CHAIN + said, *lines[i + 1 :]]))
        assert any(f"line {i + 1} " in f for f in verify(run).findings), (i, line)
        log.write_text("".join(lines[:i] + lines[i + 1 :]))
        assert not verify(run).intact, (i, line)
        if i + 1 < len(lines):
            log.write_text("".join([*lines[:i], lines[i + 1], lines[i], *lines[i + 2 :]]))
            assert not verify(run).intact
    log.write_text("".join([*lines, lines[-1]]))
    assert not verify(run).intact
    log.write_text("".join(lines))
    assert verify(run).intact


def test_a_chain_that_is_forged_anew_has_another_head(run):
    log, before, out = run / "events.jsonl", "", []
    for line in log.read_text().splitlines():
        body = line.rpartition(CHAIN)[0].replace('"bytes":', '"bytes":1') + "}"
        before = link(before, body)
        out.append(f'{body[:-1]}{CHAIN}{before}"}}\n')
    log.write_text("".join(out))
    assert any("another hash than the head" in f for f in verify(run).findings)


@pytest.mark.parametrize("spoil, says", [
    (lambda r: (r / "recipe.yaml").write_text((r / "recipe.yaml").read_text().replace("lr: 0.02", "lr: 0.03")),
     "recipe.yaml was changed"),
    (lambda r: (r / "adapter" / "adapter_model.safetensors").write_bytes(b"other"), "adapter was changed"),
    (lambda r: (r / "samples.json").unlink(), "samples.json is missing"),
    (lambda r: edit_result(r, "rounds", 3), "result.json was edited"),
    (lambda r: edit_result(r, "privacy", None), "result.json was edited"),
    (lambda r: edit_result(r, "audit", None), "holds no head"),
    (lambda r: (r / "events.jsonl").open("a").write('{"kind"') and None, "half a line")])
def test_what_the_last_event_seals(run, spoil, says):
    spoil(run)
    assert any(says in f for f in verify(run).findings), verify(run).findings


def edit_result(run, key, value):
    path = run / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))


@pytest.mark.slow
def test_the_chain_goes_on_after_a_kill(recipe, tmp_path):
    """kill -9 in mid-run: what stands verifies, the resumed run verifies, and the chain is one."""
    recipe |= {"rounds": 8, "layers": ["secagg"]}
    run = tmp_path / "small"
    killed(recipe, tmp_path, 2)
    half = verify(run)
    assert half.intact and not half.finished and half.events > 10
    log = run / "events.jsonl"
    text = log.read_text()
    log.write_text(text.replace('"direction":"up"', '"direction":"UP"', 1))
    assert not verify(run).intact  # also before it is finished
    log.write_text(text)
    fedllm.resume(run)
    whole = verify(run)
    assert whole.intact and whole.finished
    kinds = [e["kind"] for e in RunFolder(run).events()]
    assert kinds.count("resumed") == 1 and kinds.count("round") == 8 and kinds[-1] == "finished"


def test_a_log_goes_on_from_its_last_line(tmp_path):
    one = EventLog(tmp_path / "a.jsonl")
    for i in range(3):
        one.append({"kind": "round", "round": i})
    at = one.sync()
    one.append({"kind": "round", "round": 99})
    one.close()
    again = EventLog(tmp_path / "a.jsonl", at)
    again.append({"kind": "round", "round": 3})
    again.close()
    straight = EventLog(tmp_path / "b.jsonl")
    for i in range(4):
        straight.append({"kind": "round", "round": i})
    straight.close()
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()  # a function of the events alone


def test_card_and_statement_come_from_the_record_and_travel(folder, tmp_path):
    from huggingface_hub import ModelCard

    card = ModelCard.load(str(folder / "model_card.md"))
    assert card.data.to_dict()["tags"] == ["federated-learning", "fedllm"]
    (tmp_path / "again.md").write_text(str(card))
    assert ModelCard.load(str(tmp_path / "again.md")).data.to_dict() == card.data.to_dict()
    said = (folder / "privacy_statement.md").read_text()
    result = json.loads((folder / "result.json").read_text())
    assert result["audit"]["head"] in said and "hides single updates from the server" in said
    assert "| server | FedAvg.local | 10 |" in said and "sums only, by secagg" in said
    assert "| server | FedAvg.score | 10 |" in said and "test metrics of each client" in said
    report = (folder / "report.html").read_text()
    assert "Privacy and evidence" in report and result["audit"]["head"] in report
    out = fedllm.export(folder, tmp_path / "out")
    told, card = (out / "README.md").read_text(), (folder / "model_card.md").read_text()
    for mark, side in (("```python", 0), ("## Results", 2)):  # between them: how to load it, from where it lies now
        assert told.partition(mark)[side] == card.partition(mark)[side] != ""
    assert 'from_pretrained("PATH/OF/THIS/FOLDER")' in told
    assert (out / "privacy_statement.md").read_text() == said


def test_what_is_no_record(tmp_path):
    with pytest.raises(RunError, match="no run folder"):
        verify(tmp_path)
    (tmp_path / "recipe.yaml").write_text("")
    with pytest.raises(RunError, match=r"no events.jsonl"):
        verify(tmp_path)
