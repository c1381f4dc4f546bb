"""Whose text it is: the lead that counts, what none of the models wrote, and the command over finished runs."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

import fedllm
from fedllm.audits.origin_attribution import Origin, leads
from fedllm.cli.main import app
from fedllm.core.errors import DataError


def test_a_text_is_the_likeliest_models_if_it_leads_all_others_and_the_reference():
    said = np.array([[-1.0, -2.0, -3.0], [-1.0, -0.9, -3.0], [-5.0, -5.5, -5.2]])
    reference = np.array([-1.5, -4.0, -2.0])
    lead, best = leads(said, reference)
    assert best.tolist() == [0, 1, 0] and lead.tolist() == pytest.approx([0.5, 0.1, -3.0])
    assert Origin().attribute(said, reference, 0.2) == [0, None, None]
    assert Origin().attribute(said, reference, 0.05) == [0, 1, None]


def test_the_margin_lets_one_of_a_hundred_of_nobodys_texts_by():
    rng = np.random.default_rng(0)
    nobody, reference = rng.normal(0, 1, (1000, 3)), np.full(1000, -9.0)
    how = Origin()
    margin = how.margin(nobody, reference)
    assert np.mean([w is not None for w in how.attribute(nobody, reference, margin)]) <= 0.01
    assert Origin(false_positives=0.2).margin(nobody, reference) < margin
    with pytest.raises(DataError, match="needed are 100"):
        how.margin(nobody[:50], reference[:50])


@pytest.mark.slow
def test_the_command_tells_runs_apart(tmp_path, tiny_llama_folder):
    """Two runs that learned two sentences each say of a third file which is whose."""
    said = {"a": ["red green blue one two", "cat dog bird say the"],
            "b": ["good is word the say", "three two one blue red"]}
    for name, texts in said.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": "", "response": t}) + "\n"
                                                        for t in texts * 4))
        fedllm.run({"name": name, "model": tiny_llama_folder, "method": "fedavg", "rounds": 2,
                    "space": {"name": "lora", "rank": 8}, "local": {"lr": 3e-2, "steps": 30, "batch_size": 8},
                    "data": {"source": str(tmp_path / f"{name}.jsonl"), "test": 0.0,
                             "partition": {"kind": "iid", "clients": 1}},
                    "evaluate": {"exact_match": False, "samples": 0, "clients": False}}, root=tmp_path)
    (tmp_path / "texts.txt").write_text("\n".join([*said["a"], *said["b"]]))
    nobody = ["dog the good two bird", "blue word cat red is", "one say three dog the", "bird bird good one word"]
    (tmp_path / "none.txt").write_text("\n".join(nobody))
    words = ["origin", str(tmp_path / "texts.txt"), str(tmp_path / "a"), str(tmp_path / "b"),
             "--nobody", str(tmp_path / "none.txt"), "--false-positives", "0.25"]
    got = CliRunner().invoke(app, [*words, "--json"])
    assert got.exit_code == 0, got.exception
    told = json.loads(got.stdout[got.stdout.index('{"margin'):])
    assert told["origin"] == [str(tmp_path / n) for n in "aabb"]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0 and "4 of 4 texts" in shown.output
    (tmp_path / "empty.txt").write_text("\n")
    assert "has no text" in str(CliRunner().invoke(app, [words[0], str(tmp_path / "empty.txt"), *words[2:]]).exception)
