"""FeB4RAG's figures by hand, and its own data where it lies."""

import pytest

from evidence import feb4rag
from fedllm.core.errors import DataError
from fedllm.data.sources import resolve


def test_an_engines_value_by_hand():
    assert feb4rag.resource_value([3] * 10) == 100 and feb4rag.resource_value([]) == 0
    assert feb4rag.resource_value([1]) == 3  # 2.5, and up
    assert feb4rag.resource_value([3, 2, 1, 0]) == 18  # 17.5, and up
    assert feb4rag.resource_value([2] * 12) == 50  # ten count


def test_a_perfect_order_is_perfect():
    values = [{"a": 30.0, "b": 0.0, "c": 60.0}, {"a": 0.0, "b": 0.0, "c": 0.0}]
    got = feb4rag.figures([["c", "a", "b"]] * 2, values)
    assert got["nP@1"][0] == got["nP@5"][0] == got["nDCG@10"][0] == got["R@3"][0] == 1.0
    assert got["P@3"][0] == pytest.approx(2 / 3) and got["value of the 3 chosen"][0] == 30.0
    assert all(x[1] != x[1] for x in got.values())  # nobody could be right


def test_the_published_values():
    try:
        folder = resolve("shared:feb4rag")
    except DataError as error:
        pytest.skip(str(error))
    ids, texts, values, told = feb4rag.requests(folder)
    assert len(ids) == len(texts) == 790 and len(told) == 16
    assert sum(len(v) for v in values) == 12640 and sum(g == 0 for v in values for g in v.values()) == 3216
    assert values[0]["nfcorpus"] == 20 and values[0]["nq"] == 0
    oracle = [sorted(v, key=lambda e: -v[e]) for v in values]
    got = feb4rag.figures(oracle, values)
    assert all(abs(x - 1) < 1e-12 for name in ("nP@1", "nP@5", "nDCG@10") for x in got[name] if x == x)
