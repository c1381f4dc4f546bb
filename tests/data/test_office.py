"""The office generator: the same seed gives the same rows, and each knob does what it says."""

import re
from collections import Counter
from random import Random

import pytest

from fedllm.core.errors import RecipeError
from fedllm.data.office import (
    ANSWER_MARK,
    ROUTING_CODES,
    ROUTING_TASK,
    TASK_MARK,
    office_federation,
    pretraining_rows,
)
from fedllm.data.office_records import FIELDS, KINDS, draw_record
from fedllm.data.office_skew import category_counts, shard_sizes
from fedllm.data.office_tasks import TASKS
from fedllm.data.office_words import CODE


def held(federation, client):
    return {row["category"] for row in federation.clients[client].train}


def test_pretraining_rows_follow_from_the_seed():
    assert list(pretraining_rows(50, 3)) == list(pretraining_rows(50, 3))
    assert list(pretraining_rows(50, 3)) != list(pretraining_rows(50, 4))


def test_pretraining_is_varied_and_well_formed():
    rows = list(pretraining_rows(4000, 0))
    assert {row["category"] for row in rows} == {task.__name__ for _, task in TASKS}
    assert len({(row["prompt"], row["response"]) for row in rows}) > 3900
    asked = [row for row in rows if row["prompt"]]
    assert all(row["prompt"].startswith(TASK_MARK) and row["prompt"].endswith(ANSWER_MARK) for row in asked)
    assert all(row["response"] for row in rows)
    assert len({row["prompt"].split("\n")[0] for row in asked}) > 500


def test_pretraining_never_holds_the_routing_slip():
    rows = list(pretraining_rows(20_000, 1))
    assert not any(row["prompt"].startswith(TASK_MARK + ROUTING_TASK) for row in rows)
    pairs = Counter(pair for row in rows for pair in re.findall(r"\w+ = \w+", row["prompt"]))
    house = sum(pairs[f"{kind} = {code}"] for kind, code in ROUTING_CODES.items())
    # The lists of look_up draw their words afresh, so the house's own pairs come up as often as any other pairs do.
    by_chance = pairs.total() * len(ROUTING_CODES) / (len(KINDS) * len(CODE))
    assert pairs.total() > 4000 and house < 2 * by_chance


def test_shown_fields_can_be_read_off_the_text():
    rng = Random(0)
    for _ in range(500):
        record = draw_record(rng)
        assert set(record.shown) <= set(FIELDS) and "ref" in record.shown
        assert all(value in record.text for value in record.shown.values())


def test_federation_follows_from_the_seed():
    first, again = (office_federation(rows=40, label_skew=0.3, style_skew=0.5, seed=5) for _ in range(2))
    other = office_federation(rows=40, label_skew=0.3, style_skew=0.5, seed=6)
    assert first == again
    assert first.test != other.test


def test_federation_has_the_sizes_it_was_asked_for():
    federation = office_federation(clients=5, rows=30, test_rows=24, client_test_rows=7)
    assert federation.task == "generation"
    assert list(federation.clients) == [f"office-{client:02d}" for client in range(5)]
    assert [len(shard.train) for shard in federation.clients.values()] == [30] * 5
    assert {len(shard.test) for shard in federation.clients.values()} == {7}
    assert Counter(row["category"] for row in federation.test) == dict.fromkeys(ROUTING_CODES, 2)


def test_the_answer_is_code_word_and_reference():
    federation = office_federation(rows=20)
    for row in federation.pooled():
        code, reference = row["response"].split(" ")
        assert code == ROUTING_CODES[row["category"]]
        assert reference in row["prompt"] and reference.isdigit()
        assert code not in row["prompt"]


def test_no_row_appears_twice():
    federation = office_federation(rows=100, label_skew=0.2, quantity_skew=0.5, style_skew=1.0)
    prompts = [row["prompt"] for row in [*federation.pooled(), *federation.test]]
    prompts += [row["prompt"] for shard in federation.clients.values() for row in shard.test]
    assert len(prompts) == len(set(prompts))


def test_label_skew_leaves_clients_without_some_categories():
    even, skewed = office_federation(rows=60), office_federation(rows=60, label_skew=0.1)
    assert all(held(even, client) == set(ROUTING_CODES) for client in even.clients)
    assert all(len(held(skewed, client)) < len(ROUTING_CODES) - 2 for client in skewed.clients)
    assert set().union(*(held(skewed, client) for client in skewed.clients)) == set(ROUTING_CODES)
    for client, shard in skewed.clients.items():
        assert {row["category"] for row in shard.test} <= held(skewed, client)
        assert set(shard.info["categories"]) == held(skewed, client)


def test_quantity_skew_makes_sizes_unequal_and_keeps_the_total():
    federation = office_federation(rows=60, quantity_skew=0.5)
    sizes = [len(shard.train) for shard in federation.clients.values()]
    assert sum(sizes) == 8 * 60 and min(sizes) >= 8 and max(sizes) > 3 * min(sizes)


def test_style_skew_gives_each_client_its_own_layout():
    shared, own = office_federation(rows=60), office_federation(rows=60, style_skew=1.0)
    layouts = {name: {row["style"] for row in shard.train} for name, shard in own.clients.items()}
    assert all(len(found) == 1 for found in layouts.values())
    assert len(set().union(*layouts.values())) == 8
    assert all(len({row["style"] for row in shard.train}) > 4 for shard in shared.clients.values())


def test_skew_tables_keep_their_margins():
    sizes = shard_sizes(6, 600, 0.3, seed=1)
    counts = category_counts(sizes, 9, 0.2, seed=1)
    assert sum(sizes) == 600 and [sum(row) for row in counts] == sizes
    for category in range(9):
        assert abs(sum(row[category] for row in counts) - 600 / 9) < 12


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("clients", 0, "whole number of 1 or more"),
        ("rows", 2.5, "whole number of 1 or more"),
        ("test_rows", -1, "whole number of 0 or more"),
        ("client_test_rows", "ten", "whole number of 0 or more"),
        ("categories", 13, "whole number from 2 to 12"),
        ("seed", -1, "whole number of 0 or more"),
        ("label_skew", 0, "from 0.01 (harsh) to 1000"),
        ("label_skew", "strong", "from 0.01 (harsh) to 1000"),
        ("quantity_skew", float("nan"), "from 0.01 (harsh) to 1000"),
        ("style_skew", 1.5, "from 0 (shared styles) to 1 (own style)"),
        ("style_skew", True, "from 0 (shared styles) to 1 (own style)"),
    ],
)
def test_a_wrong_knob_is_named_with_its_value_and_range(key, value, allowed):
    with pytest.raises(RecipeError) as caught:
        office_federation(**{key: value})
    message = str(caught.value)
    assert message.startswith(f"{key} is {value!r}") and allowed in message
