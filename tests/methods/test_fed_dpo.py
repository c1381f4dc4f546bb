"""FedDPO: what it starts from, both engines, its reference, and rows that are no preferences."""

from __future__ import annotations

import json
import math

import pytest
import torch

import fedllm
from fedllm.core.errors import CompositionError, DataError
from fedllm.core.program import drive
from fedllm.data.load import load_federation
from fedllm.privacy.dp_sgd import DPSGD
from fedllm.runs.fits import compose


def preferring(begin, **options):
    """FedDPO on the tiny federation's preferences."""
    return begin("fed_dpo", task="preference", **options)


def scores(run):
    return drive(run.method.evaluate(run.state, run.world.infos(), "local"), run.engine, run.engine.stack[1:])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("space", ["lora", "full"])
def test_engines_agree(begin, gap, dtype, tolerance, space):
    one, many = (preferring(begin, engine=e, dtype=dtype, space=space).go(2) for e in ("in_process", "vectorized"))
    assert gap(one.state["theta"], many.state["theta"]) <= tolerance
    a, b = scores(one), scores(many)
    for c in a:
        assert dict(a[c]) == pytest.approx(dict(b[c]), abs=10 * tolerance)
        assert gap({"r": one.engine.memory[c]["ref"]}, {"r": many.engine.memory[c]["ref"]}) <= 10 * tolerance


def test_it_begins_at_ln_2_and_a_tie_and_learns(begin):
    run = preferring(begin, local={"optimizer": "adamw", "lr": 0.02})
    before = scores(run)
    assert all(s["dpo_loss"] == pytest.approx(math.log(2), abs=1e-12) and s["preference"] == 0.5
               for s in before.values())
    start = run.world.model.initial()
    run.go(3)
    for c, memory in run.engine.memory.items():
        call = {i.id: i for i in run.world.infos()}[c]
        assert len(memory["ref"]) == call.n
    told = {c: s["dpo_loss"] for c, s in scores(run).items()}
    assert sum(told.values()) < 4 * math.log(2) or min(told.values()) < math.log(2)
    assert all(torch.equal(a, b) for a, b in zip(start.values(), run.world.model.initial().values(), strict=True))


def test_under_dp_sgd_it_is_refused_in_one_sentence(begin):
    run = preferring(begin, layers=(DPSGD(noise_multiplier=1.0),))
    run.engine.begin(0)
    states = [layer.init() for layer in run.engine.stack[1:]]
    with pytest.raises(CompositionError, match=r"through client\.fit only, and this one reads the rows"):
        compose(run.method, [*run.engine.stack[1:]])
    with pytest.raises(CompositionError, match=r"through client\.fit only, and this one reads the rows"):
        drive(run.method.round(run.state, run.world.infos()), run.engine, run.engine.stack[1:], states)


def test_a_classifier_has_no_answers_to_prefer(begin):
    with pytest.raises(CompositionError, match=r"'fed_dpo' and data\.task = 'classification' do not fit"):
        run = begin("fed_dpo", task="classification")
        run.method.check(run.world.model)


ONE = {"test": 0.0, "partition": {"kind": "iid", "clients": 1}, "task": "preference"}
GOOD = [{"prompt": f"say {w}", "chosen": "yes", "rejected": "no"} for w in ("one", "two", "three")]


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_preference_rows_of_every_kind_of_file(ending, tmp_path):
    path = tmp_path / f"rows.{ending}"
    write(path, GOOD)
    fed = load_federation({**ONE, "source": str(path), "template": "Q: {prompt}\n"}, 0)
    assert sorted(fed.pooled(), key=str)[0] == {"prompt": "Q: say one\n", "chosen": "yes", "rejected": "no"}
    assert len(fed.pooled()) == 3


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize(("bad", "says"), [({"rejected": "yes"}, "'chosen' and 'rejected' are the same text"),
                                           ({"rejected": ""}, "'rejected' is ''; a preference row needs text"),
                                           ({"chosen": "  "}, "'chosen' is '  '")])
def test_bad_preferences_are_named_by_file_and_row(ending, bad, says, tmp_path):
    path = tmp_path / f"rows.{ending}"
    write(path, [GOOD[0], {**GOOD[1], **bad}, GOOD[2]])
    with pytest.raises(DataError, match=says) as error:
        load_federation({**ONE, "source": str(path)}, 0)
    assert "rows." + ending in str(error.value) and ("2" in str(error.value) or "3" in str(error.value))


def test_a_line_that_lacks_an_answer_is_named_and_other_names_can_be_mapped(tmp_path):
    path = tmp_path / "rows.jsonl"
    write(path, [GOOD[0], {"prompt": "say two", "chosen": "yes"}])
    with pytest.raises(DataError, match=r"row 2 \(line 2\) has no field 'rejected'"):
        load_federation({**ONE, "source": str(path)}, 0)
    write(path, [{"q": "say one", "good": "yes", "bad": "no"}] * 2)
    fields = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    fed = load_federation({**ONE, "source": str(path), "fields": fields}, 0)
    assert fed.pooled()[0]["chosen"] == "yes" and fed.pooled()[0]["rejected"] == "no"


def write(path, rows):
    if path.suffix == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        import csv

        with path.open("w", newline="") as file:
            out = csv.DictWriter(file, list(rows[0]))
            out.writeheader()
            out.writerows(rows)
    else:
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_a_recipe_runs_it_from_a_file_to_an_adapter(recipe, tmp_path):
    rows = [{"prompt": f"say the word {a} {b}", "chosen": f"{b} {a}", "rejected": f"{a} {b}"}
            for a in ("red", "green", "blue") for b in ("cat", "dog", "bird") for _ in range(8)]
    write(tmp_path / "pairs.jsonl", rows)
    data = {**recipe["data"], "task": "preference", "source": str(tmp_path / "pairs.jsonl")}
    result = fedllm.run({**recipe, "data": data, "method": "fed_dpo", "rounds": 2}, root=tmp_path / "runs")
    told = json.loads((result.folder / "result.json").read_text())
    assert 0 <= next(iter(told["evaluation"]["clients"].values()))["preference"] <= 1
    assert result.adapter_path.is_dir()


def test_the_claims_rig_is_seeded_and_starts_at_ln_2():
    from evidence.rigs.learning import preferences

    one, two = (preferences("fed_dpo", 100, rounds=1) for _ in range(2))
    assert one == two and one["start_error"] < 1e-6 and one["dpo_loss"] < math.log(2)
