"""Every partitioner gives each row to exactly one client, keeps its own promise, and refuses what it cannot do."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.core.errors import DataError, RecipeError
from fedllm.data.partition import FILE, KINDS, partitioner
from fedllm.data.parts import sizes


def make_rows(n, classes=4):
    return [{"text": f"word{i % classes} topic{i % classes} n{i}", "label": i % classes, "lang": "abcde"[i % 5],
             FILE: f"f{i % 3}"} for i in range(n)]


def split(spec, rows, seed=0, **kwargs):
    return partitioner(spec).split(rows, np.random.default_rng(seed), **kwargs)


def specs():
    clients = st.integers(1, 6)
    return st.one_of(
        st.fixed_dictionaries({"kind": st.just("iid"), "clients": clients}),
        st.fixed_dictionaries({"kind": st.just("dirichlet"), "clients": clients, "alpha": st.floats(1e-3, 1e4),
                               "min_examples": st.integers(1, 5)}),
        st.fixed_dictionaries({"kind": st.just("shards"), "clients": st.integers(2, 6), "classes": st.integers(2, 4)}),
        st.fixed_dictionaries({"kind": st.just("quantity"), "clients": clients, "skew": st.floats(0, 20),
                               "law": st.sampled_from(["lognormal", "power"]), "min_examples": st.integers(1, 5)}),
        st.fixed_dictionaries({"kind": st.just("by_key"), "key": st.just("lang"), "min_examples": st.integers(1, 12)}),
        st.just({"kind": "per_file"}),
    )


@settings(max_examples=150, deadline=None)
@given(spec=specs(), n=st.integers(30, 80), seed=st.integers(0, 2**32))
def test_every_row_has_exactly_one_client(spec, n, seed):
    rows = make_rows(n)
    parts = split(spec, rows, seed)
    assert sorted(i for part in parts.values() for i in part) == list(range(n))
    assert all(parts.values())
    assert parts == split(spec, rows, seed)
    if spec["kind"] in ("dirichlet", "quantity"):
        assert min(map(len, parts.values())) >= spec["min_examples"]


@given(total=st.integers(0, 1000), weights=st.lists(st.floats(1e-9, 1e3), min_size=1, max_size=20))
def test_sizes_sum_to_the_total(total, weights):
    got = sizes(total + len(weights), np.array(weights), 1)
    assert got.sum() == total + len(weights)
    assert got.min() >= 1


def test_dirichlet_skew_grows_as_alpha_falls():
    rows = make_rows(2000)

    def largest_share(alpha):
        parts = split({"kind": "dirichlet", "clients": 10, "alpha": alpha}, rows)
        return np.mean([np.bincount([rows[i]["label"] for i in p]).max() / len(p) for p in parts.values()])

    assert largest_share(100) < 0.35 < 0.5 < largest_share(0.1)


def test_shards_give_each_client_its_number_of_classes():
    rows = make_rows(400, classes=10)
    parts = split({"kind": "shards", "clients": 20, "classes": 3}, rows)
    assert {len({rows[i]["label"] for i in part}) for part in parts.values()} == {3}
    with pytest.raises(RecipeError, match=r"classes = 1: allowed is 2 to 10"):
        split({"kind": "shards", "clients": 5, "classes": 1}, rows)


def test_quantity_skew_makes_sizes_unequal():
    even, uneven = (sorted(map(len, split({"kind": "quantity", "clients": 10, "skew": skew, "law": "power"},
                                          make_rows(1000)).values())) for skew in (0, 1.5))
    assert even == [100] * 10
    assert uneven[-1] > 10 * uneven[0]


def test_by_key_names_clients_by_value_and_takes_care_of_small_ones(caplog):
    rows = [{"lang": lang} for lang in ["sw"] * 5 + ["a/b"] + ["a b"] + ["..", "en", "en"]]
    parts = split({"kind": "by_key", "key": "lang"}, rows)
    assert list(parts) == ["_", "a_b", "a_b~2", "en", "sw"]
    assert {name: len(p) for name, p in split({"kind": "by_key", "key": "lang", "min_examples": 2}, rows).items()} == {
        "en": 2, "sw": 5, "other": 3}
    dropped = split({"kind": "by_key", "key": "lang", "min_examples": 2, "small": "drop"}, rows)
    assert list(dropped) == ["en", "sw"]
    assert "3 rows are left out" in caplog.text
    with pytest.raises(DataError, match="would have no rows"):
        split({"kind": "by_key", "key": "lang", "min_examples": 9, "small": "drop"}, rows)
    with pytest.raises(DataError, match="row 1 has no field 'lagn'; it has lang; did you mean 'lang'"):
        split({"kind": "by_key", "key": "lagn"}, rows)


@pytest.mark.parametrize("given_as", ["words", "callable", "array"])
def test_by_cluster_finds_the_topics(given_as):
    rows = [{"text": ("cat dog pet fur" if i % 2 else "stock bond fund bank") + f" {i % 7}"} for i in range(40)]
    points = np.array([[i % 2, 0.0] for i in range(40)])
    embed = {"words": None, "callable": lambda texts: points, "array": points}[given_as]
    parts = split({"kind": "by_cluster", "clients": 2}, rows, embed=embed)
    assert sorted(map(tuple, parts.values())) == [tuple(range(0, 40, 2)), tuple(range(1, 40, 2))]


def test_by_cluster_refuses_bad_embeddings_wordless_texts_and_too_few_topics():
    rows = [{"text": "same words"}] * 10
    with pytest.raises(DataError, match=r"shape \(3, 2\)"):
        split({"kind": "by_cluster", "clients": 2}, rows, embed=np.zeros((3, 2)))
    with pytest.raises(DataError, match="client-01 would have no rows"):
        split({"kind": "by_cluster", "clients": 2}, rows)
    with pytest.raises(DataError, match="no words"):
        split({"kind": "by_cluster", "clients": 2}, [{"text": "?!"}] * 10)


@pytest.mark.parametrize("spec, said", [
    ({"kind": "iid", "clients": 0}, r"data\.partition\.clients = 0: allowed is a whole number from 1 up"),
    ({"kind": "iid", "clients": True}, "clients = True"),
    ({"kind": "iid", "clients": 2.5}, "clients = 2.5"),
    ({"kind": "dirichlet", "clients": 2, "alpha": 0}, r"alpha = 0: allowed is a number from 1e-06 to 1e"),
    ({"kind": "dirichlet", "clients": 2, "alpha": float("nan")}, "alpha = nan"),
    ({"kind": "dirichlet", "clients": 2, "alpha": "1e-2"}, "alpha = '1e-2'"),
    ({"kind": "dirichlet", "clients": 2}, "dirichlet needs alpha"),
    ({"kind": "dirichlet", "clients": 2, "alpha": 1, "min_examples": 0}, "min_examples = 0"),
    ({"kind": "quantity", "clients": 2, "law": "zipf"}, "law = 'zipf': allowed is one of lognormal, power"),
    ({"kind": "by_key", "key": "x", "small": "mrge"}, "did you mean 'merge'"),
    ({"kind": "iid", "cliens": 2}, "iid has no such knob; did you mean 'clients'"),
    ({"kind": "dirchlet"}, "did you mean 'dirichlet'"),
])
def test_knobs_out_of_range_are_refused(spec, said):
    with pytest.raises(RecipeError, match=said):
        partitioner(spec)


@pytest.mark.parametrize("kind", ["iid", "quantity", "by_cluster", "dirichlet"])
def test_a_client_that_would_be_empty_is_named_and_one_row_is_enough(kind):
    spec = {"kind": kind, "clients": 3, **({"alpha": 0.5} if kind == "dirichlet" else {})}
    with pytest.raises(DataError, match="client-02 would have"):
        split(spec, make_rows(2))
    assert sorted(map(len, split(spec, make_rows(3)).values())) == [1, 1, 1]


def test_every_kind_is_documented():
    assert all(kind.__doc__ and not kind.__doc__.startswith(kind.__name__ + "(") for kind in KINDS.values())
