"""The numeric core of the robust rules equals flwr's strategies on the same inputs; where flwr departs is pinned."""

import numpy as np
import pytest
import torch

from fedllm.defenses._robust import distances
from fedllm.defenses.bulyan import near_median, selection
from fedllm.defenses.krum import krum_scores
from fedllm.defenses.median import median
from fedllm.defenses.trimmed_mean import trimmed_mean

strategy = pytest.importorskip("flwr.server.strategy")
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays  # noqa: E402
from flwr.server.strategy.aggregate import aggregate_krum  # noqa: E402

SHAPES = ((4, 3), (7,), (2, 2, 2))


def updates(n, seed=0, far=0):
    """n clients' lists of arrays, the last `far` of them far away."""
    rng = np.random.default_rng(seed)
    out = [[rng.normal(size=s).astype(np.float32) for s in SHAPES] for _ in range(n)]
    return [[a + 30 * (k >= n - far) for a in arrays] for k, arrays in enumerate(out)]


def flat(arrays):
    return torch.from_numpy(np.concatenate([a.ravel() for a in arrays]))


def theirs(kind, given, rows=None):
    """What flwr's strategy makes of these arrays; `rows` are the numbers of examples."""
    rows = rows or [1] * len(given)
    ok = Status(Code.OK, "")
    results = [(None, FitRes(ok, ndarrays_to_parameters(a), n, {})) for a, n in zip(given, rows, strict=True)]
    parameters, _ = kind.aggregate_fit(1, results, [])
    return flat(parameters_to_ndarrays(parameters))


def stacked(given):
    return torch.stack([flat(a) for a in given])


@pytest.mark.parametrize("n", [3, 4, 9, 10])
def test_median(n):
    given = updates(n, n)
    torch.testing.assert_close(median(stacked(given)), theirs(strategy.FedMedian(), given), atol=1e-7, rtol=0)
    np.testing.assert_allclose(median(stacked(given)), np.median(stacked(given).numpy(), 0), atol=1e-7)


@pytest.mark.parametrize("n, beta", [(5, 0.2), (10, 0.2), (10, 0.34), (7, 0.0)])
def test_trimmed_mean(n, beta):
    from scipy.stats import trim_mean

    given = updates(n, n)
    mine = trimmed_mean(stacked(given), int(beta * n))
    torch.testing.assert_close(mine, theirs(strategy.FedTrimmedAvg(beta=beta), given), atol=1e-6, rtol=0)
    np.testing.assert_allclose(mine, trim_mean(stacked(given).numpy(), beta), atol=1e-6)


@pytest.mark.parametrize("n, f", [(5, 1), (10, 2), (11, 4)])
@pytest.mark.parametrize("seed", [0, 1])
def test_krum_and_multi_krum(n, f, seed):
    given = updates(n, seed, far=f)
    x = stacked(given)
    order = krum_scores(distances(x), f).argsort(stable=True)
    krum = strategy.Krum(num_malicious_clients=f, num_clients_to_keep=0)
    torch.testing.assert_close(x[order[0]], theirs(krum, given), atol=0, rtol=0)
    keep = n - f - 2
    multi = strategy.Krum(num_malicious_clients=f, num_clients_to_keep=keep)
    torch.testing.assert_close(x[order[:keep]].mean(0), theirs(multi, given), atol=1e-6, rtol=0)


def test_krum_scores_are_the_papers():
    x, f = stacked(updates(8, 3)), 2
    brute = [sorted(float((x[i] - x[j]).double().pow(2).sum()) for j in range(8) if j != i)[: 8 - f - 2]
             for i in range(8)]
    np.testing.assert_allclose(krum_scores(distances(x), f), [sum(b) for b in brute], rtol=1e-6)


def test_flwrs_multi_krum_weighs_by_declared_rows():
    """The paper averages those selected all alike; with flwr one that declares many rows is nearly the result."""
    given = updates(10, 5)
    rows = [1] * 10
    best = int(krum_scores(distances(stacked(given)), 2).argmin())
    rows[best] = 10**6
    multi = strategy.Krum(num_malicious_clients=2, num_clients_to_keep=6)
    torch.testing.assert_close(theirs(multi, given, rows), flat(given[best]), atol=1e-3, rtol=0)


def test_flwrs_krum_does_not_refuse_too_many_attackers():
    """n >= 2f + 3 is the paper's condition; with n = 5, f = 2 flwr goes on and says nothing."""
    given = updates(5, 1)
    got = aggregate_krum([(a, 1) for a in given], num_malicious=2, to_keep=0)
    assert any(np.array_equal(got[0], a[0]) for a in given)


@pytest.mark.parametrize("n, f", [(7, 1), (11, 2), (12, 2)])
def test_bulyan(n, f):
    given = updates(n, n, far=f)
    x = stacked(given)
    chosen = x[selection(x, f)]
    bulyan = strategy.Bulyan(num_malicious_clients=f, to_keep=0)
    torch.testing.assert_close(near_median(chosen, len(chosen) - 2 * f), theirs(bulyan, given), atol=1e-6, rtol=0)


def test_flwrs_newer_bulyan_selects_at_once():
    """`serverapp.strategy.Bulyan` takes the n - 2f lowest scores; the paper picks one at a time and scores afresh."""
    from flwr.app import ArrayRecord, RecordDict
    from flwr.serverapp.strategy.multikrum import select_multikrum

    n, f, differ = 11, 2, 0
    for seed in range(20):
        given = updates(n, seed)
        x = stacked(given)
        records = [RecordDict({"arrays": ArrayRecord(a)}) for a in given]
        picked = select_multikrum(records, f, n - 2 * f)
        at_once = {next(i for i, r in enumerate(records) if r is p) for p in picked}
        assert at_once == set(krum_scores(distances(x), f).argsort()[: n - 2 * f].tolist())
        differ += at_once != set(selection(x, f))
    assert differ > 0
