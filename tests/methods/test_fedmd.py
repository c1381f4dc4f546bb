"""FedMD in closed form: the consensus is the mean of the clients' logits, one client alone agrees with itself."""

from dataclasses import replace

import pytest
import torch

from fedllm.core.errors import CompositionError
from fedllm.methods.registry import make_method
from fedllm.models.batch import collate

KNOBS = {"transfer_steps": 2, "own_steps": 1, "digest_steps": 1, "alignment": 6}


def started(begin, sizes=(5, 7, 9), **knobs):
    """(the run, the two asks of its first round and their replies)."""
    run = begin("fedmd", task="classification", sizes=sizes, **{**KNOBS, **knobs})
    fed = run.world.federation
    run.world.federation = replace(fed, public=[*fed.test, *fed.clients["c0"].test, *fed.clients["c0"].train])
    program = run.method.round(run.state, run.world.infos())
    first = next(program)
    [out] = run.engine.send([first])
    second = program.send(out)
    theta = {c: dict(run.engine.staged(c)["theta"]) for c in fed.clients}
    return run, theta, second, run.engine.send([second])[0]


def own(run, theta):
    """A client's logits on the public rows of round 0, by one plain forward."""
    model, call = run.world.model, type("Call", (), {"public": run.world.encoded("c0", "public")})()
    with torch.no_grad(), model.using([theta]):
        return model.class_logits(collate([run.method.rows(call, 0)], model.pad, model.device)).cpu()


def test_one_client_agrees_with_itself(begin, gap):
    run, theta, second, out = started(begin, sizes=(9,))
    assert gap({"z": second.msgs["c0"]["consensus"]}, {"z": own(run, theta["c0"])}) < 1e-10
    assert out.value["gap"] < 1e-10


def test_the_consensus_is_the_mean_of_the_logits(begin, gap):
    run, theta, second, out = started(begin)
    z = torch.stack([own(run, t) for t in theta.values()])
    assert z.std(0).max() > 1e-3  # they do differ
    assert all(gap({"z": m["consensus"]}, {"z": z.mean(0)}) < 1e-10 for m in second.msgs.values())
    assert float((z - z.mean(0)).abs().mean()) / 3 < out.value["gap"] < 3 * float((z - z.mean(0)).abs().mean())


def test_a_logit_counts_where_its_class_was_seen(begin, gap):
    run = begin("fedmd", task="classification", sizes=(5, 7, 9), count="seen", **KNOBS)
    fed = run.world.federation
    only = {"c0": {0}, "c1": {0, 1}, "c2": {0, 1}}  # nobody has class 2
    shards = {c: replace(s, train=[{**r, "label": min(only[c] & {r["label"]} or {max(only[c])})} for r in s.train])
              for c, s in fed.clients.items()}
    run.world.federation = replace(fed, clients=shards, public=fed.test)
    program = run.method.round(run.state, run.world.infos())
    first = next(program)
    second = program.send(run.engine.send([first])[0])
    theta = {c: dict(run.engine.staged(c)["theta"]) for c in shards}
    seen = {c: {r["label"] for r in s.train} for c, s in shards.items()}
    z, got = {c: own(run, t) for c, t in theta.items()}, second.msgs["c0"]["consensus"]
    for k in range(3):
        counted = [z[c][:, k] for c in z if k in seen[c]]
        want = torch.stack(counted).mean(0) if counted else torch.zeros(len(got), dtype=got.dtype)
        assert gap({"z": got[:, k]}, {"z": want}) < 1e-10
    assert seen["c0"] == {0} and len(seen["c1"]) == 2


def test_a_client_counts_by_how_sure_it_is_of_a_row(begin, gap):
    run, theta, second, _ = started(begin, count="sure")
    z = torch.stack([own(run, t) for t in theta.values()])
    w = z.softmax(-1).amax(-1, keepdim=True) - 1 / 3 + 1e-6
    assert gap({"z": second.msgs["c0"]["consensus"]}, {"z": (z * w).sum(0) / w.sum(0)}) < 1e-10
    assert w.std(0).max() > 1e-4


def test_digesting_brings_clients_nearer(begin):
    """Twenty steps towards the consensus end nearer to it than two, on the mean over the steps."""
    gaps = [float(started(begin, digest_steps=n)[3].value["gap"]) for n in (2, 20)]
    assert gaps[1] < 0.9 * gaps[0]


def test_another_task_is_refused(begin):
    run = begin("fedavg")
    with pytest.raises(CompositionError, match=r"'fedmd' shares class logits and data.task is 'generation'"):
        make_method("fedmd").check(run.world.model)
