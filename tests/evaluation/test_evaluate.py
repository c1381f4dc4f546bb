"""A finished run on rows of one's own and on lm-eval's tasks, checked against lm-eval's own model for transformers."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

import fedllm
from fedllm.cli.main import app
from fedllm.core.errors import DataError, RecipeError, RunError
from fedllm.evaluation.measure import on_rows, on_tasks
from fedllm.evaluation.rows import change
from fedllm.evaluation.trained import Trained

COLORS = ("red", "green", "blue")
CHOICE = """task: colors
dataset_path: json
dataset_kwargs: {data_files: {test: asked.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_target: gold
doc_to_choice: "{{choices}}"
"""
SAY = """task: say
dataset_path: json
dataset_kwargs: {data_files: {test: asked.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{response}}"
generation_kwargs: {until: ["green"], max_gen_toks: 3, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory, rows_file, tiny_llama_folder):
    """A run of one round, thirty questions with options, and two task files."""
    folder = tmp_path_factory.mktemp("made")
    rows = [{"prompt": f"say the word {COLORS[i % 3]} {a}", "response": f"{a} {COLORS[i % 3]}",
             "choices": [f"{a} {c}" for c in COLORS], "gold": i % 3}
            for i, a in zip(range(30), ["cat", "dog", "bird"] * 10, strict=True)]
    (folder / "asked.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "colors.yaml").write_text(CHOICE)
    (folder / "say.yaml").write_text(SAY)
    run = fedllm.run({"name": "small", "model": tiny_llama_folder, "rounds": 2, "local": {"lr": 0.02, "steps": 8},
                      "data": {"source": rows_file, "partition": {"kind": "iid", "clients": 2}},
                      "evaluate": {"max_new_tokens": 4, "samples": 0, "metric": ["exact", "choice"]}}, root=folder)
    return run, folder


def test_lm_eval_is_told_what_its_own_model_says(made, tiny_llama_folder):
    """Likelihoods, greedy answers and rolling windows as by lm-eval's HFLM on plain PEFT; figures follow from them."""
    from types import SimpleNamespace

    from lm_eval.models.huggingface import HFLM
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fedllm.evaluation.harness import ArmLM

    run, folder = made
    rows = [json.loads(line) for line in (folder / "asked.jsonl").read_text().splitlines()]
    net = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama_folder),
                                    str(run.adapter_path)).eval()
    plain = HFLM(pretrained=net, tokenizer=AutoTokenizer.from_pretrained(tiny_llama_folder), batch_size=8)
    ours = ArmLM(Trained(run.folder).after)

    def asked(*args):
        return SimpleNamespace(args=args)

    bos = ours.tokenizer.bos_token  # rows that the run trained on began with it; lm-eval goes by the tokenizer alone
    pairs = [asked(bos + r["prompt"], f" {c}") for r in rows for c in r["choices"]]
    mine, theirs = (np.array(lm.loglikelihood(pairs, disable_tqdm=True), float) for lm in (ours, plain))
    assert np.allclose(mine, theirs, atol=1e-4) and len(set(mine[:, 0].round(3))) == 9  # distinct rows
    texts = [asked(bos + r["prompt"]) for r in rows[:3]]
    assert np.allclose(ours.loglikelihood_rolling(texts), plain.loglikelihood_rolling(texts, disable_tqdm=True),
                       atol=1e-4)
    how = {"until": ["green"], "max_gen_toks": 3, "do_sample": False}
    heard = [lm.generate_until([asked(bos + r["prompt"], dict(how)) for r in rows[:9]], disable_tqdm=True)
             for lm in (ours, plain)]
    assert [t.strip() for t in heard[0]] == [t.strip() for t in heard[1]]

    files = [str(folder / "colors.yaml"), str(folder / "say.yaml")]
    found, path = on_tasks(run.folder, files, base=False)
    right = theirs[:, 0].reshape(-1, 3).argmax(1) == [r["gold"] for r in rows]
    assert found["after"]["results"]["colors"]["acc,none"] == pytest.approx(right.mean())
    assert 0 <= found["after"]["results"]["say"]["exact_match,none"] <= 1
    assert json.loads(path.read_text())["after"]["n-samples"]["colors"]["effective"] == 30
    again = on_tasks(run.folder, files[:1], limit=3)
    assert again[1] != path and path.parent == run.folder / "evaluations" and "before" in again[0]


def test_a_continuation_is_never_empty(made):
    from types import SimpleNamespace

    from fedllm.evaluation.harness import ArmLM

    lm = ArmLM(Trained(made[0].folder).after)
    tokens = {"a\n": [1, 2], "a": [1, 7, 7], "a\nb": [1, 2, 3],  # "a" is longer than what it begins
              "c": [1, 4], "cd": [1, 9], "e ": [1, 5, 6], "e": [1, 5], "e f": [1, 5, 8]}
    lm.tok_encode = lambda text, add_special_tokens=None: list(tokens[text])
    assert lm._encode_pair("a\n", "b") == ([1, 2], [3])
    assert lm._encode_pair("c", "d") == ([1], [9])  # one token holds the end of the one and the other
    assert lm._encode_pair("e ", "f") == ([1, 5], [8])
    del lm.tok_encode
    got = lm.loglikelihood([SimpleNamespace(args=("say the word", w)) for w in (" red", " green")], disable_tqdm=True)
    assert all(logp < 0 for logp, _ in got)


@pytest.mark.parametrize("text, why", [
    ("task: [x", "cannot be read"), ("output_type: generate_until", "no key 'task'"),
    (CHOICE.replace("asked.jsonl", "gone.jsonl"), "is not there"), (CHOICE.replace("{{prompt}}", "{{a.b}}"), "lm-eval"),
    (None, "no such file")], ids=["yaml", "nameless", "no data", "no column", "no file"])
def test_a_broken_task_is_told_as_such(made, tmp_path, text, why):
    if text:
        (tmp_path / "odd.yaml").write_text(text)
        (tmp_path / "asked.jsonl").write_bytes((made[1] / "asked.jsonl").read_bytes())
    with pytest.raises(RecipeError, match=why):
        on_tasks(made[0].folder, [str(tmp_path / "odd.yaml")], base=False)


def test_without_lm_eval_its_extra_is_named(made, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "fedllm.evaluation.harness", raising=False)
    with pytest.raises(RecipeError, match=r"fedlm\[evaluate\]"):
        on_tasks(made[0].folder, ["gsm8k"])


def test_rows_of_ones_own_before_and_after(made):
    run, folder = made
    found, path = on_rows(run.folder, str(folder / "asked.jsonl"), ["exact", "rouge", "choice"])
    assert {"loss", "exact_match", "rouge_l", "choice", "choice_likelihood"} == found.metrics.keys()
    loss = found.metrics["loss"]
    assert loss.low <= loss.difference <= loss.high < 0 and loss.difference == pytest.approx(loss.after - loss.before)
    kept = json.loads(path.read_text())
    assert kept["n"] == 30 and len(kept["rows"]) == 30 and kept["rows"][0]["expected"] == "cat red"
    each = [r["figures"]["rouge_l"][1] for r in kept["rows"]]
    assert found.metrics["rouge_l"].after == pytest.approx(np.mean(each))
    own, _ = on_rows(run.folder, None)  # the recipe's own test and metrics: what the run's result says
    assert own.metrics["loss"].after == pytest.approx(run.evaluation["global"]["loss"], abs=1e-6)
    assert own.metrics["exact_match"].after == pytest.approx(run.evaluation["global"]["exact_match"])
    for wrong, data in ((DataError, str(folder / "nope.jsonl")), (RunError, None)):
        with pytest.raises(wrong):
            on_rows(run.folder if data else folder, data)


def test_the_paired_interval_is_that_of_differences():
    """Two arms that differ by the same on every row differ by it for sure, however much the rows differ."""
    draw, one = np.random.default_rng(0), np.ones(200)
    a = draw.normal(0, 50, 200)
    sure = change((a, one), (a + 1, one), None, draw)
    assert sure.low == pytest.approx(1) and sure.high == pytest.approx(1)
    d = draw.normal(0.5, 2, 200)
    got = change((a, one), (a + d, one), None, draw)
    half = 1.96 * d.std(ddof=1) / 200**0.5  # what the central limit theorem says
    assert got.low == pytest.approx(d.mean() - half, abs=0.04) and got.high == pytest.approx(d.mean() + half, abs=0.04)


def test_the_command_shows_a_table_or_one_line_of_json(made):
    run, folder = made
    words = ["evaluate", str(run.folder), "--data", str(folder / "asked.jsonl"), "--limit", "5"]
    table, line = (CliRunner().invoke(app, [*words, *more]) for more in ([], ["--json"]))
    assert table.exit_code == 0 and "difference" in table.output and "5 rows of" in table.output
    said = json.loads(line.stdout.strip().splitlines()[-1])
    assert said["n"] == 5 and "rows" not in said and said["metrics"]["loss"]["after"] > 0
    with pytest.raises(RecipeError, match="two measurements"):
        CliRunner().invoke(app, [*words, "--tasks", "x"], catch_exceptions=False)
