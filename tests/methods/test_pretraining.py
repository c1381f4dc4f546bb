"""Pre-training methods against DiLoCo and closed forms, and what of a client's absence they survive."""

from __future__ import annotations

import math

import pytest
import torch

from fedllm.core.errors import CompositionError, ModelError, PayloadError, QuorumError, RecipeError
from fedllm.core.payload import add, scale, sub, zeros_like
from fedllm.core.program import drive
from fedllm.engines.in_process import InProcess
from fedllm.local.spec import LocalSpec
from fedllm.methods import registry
from fedllm.methods._chunks import Chunks, of_twelve, twelve
from fedllm.methods._coarse import coarse, fine
from fedllm.methods._fragments import fragments
from fedllm.methods.registry import make_method
from fedllm.runs.build import build
from fedllm.runs.recipe import load_recipe
from fedllm.wire.codec_quant import CodecQuant

ADAM = {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1, "steps": 3}
ONE = {"optimizer": "sgd", "lr": 0.1, "steps": 1}


def tree(*shapes):
    gen = torch.Generator().manual_seed(0)
    return {f"t{i}": torch.randn(s, generator=gen) for i, s in enumerate(shapes)}


# photon

def test_photon_with_nesterov_at_rate_1_without_momentum_is_fedavg(begin, gap):
    plain = begin("photon", server="nesterov", server_lr=1.0, server_momentum=0.0, local=ADAM).go(2)
    average = begin("photon", server="fedavg", local=ADAM).go(2)
    assert gap(plain.state["theta"], average.state["theta"]) == 0
    assert gap(average.state["theta"], begin("fedavg", local=ADAM).go(2).state["theta"]) < 1e-12


def test_photon_with_one_sgd_step_is_one_large_batch_step(begin, gap):
    """Equal batches, so that the mean of the clients' steps is the step on the mean gradient."""
    made = begin("photon", server="fedavg", local=ONE, sizes=(4, 4, 4))
    theta = made.state["theta"]
    one = {c: begin("photon", server="fedavg", local=ONE, sizes=(4, 4, 4)).go(1, [c]).state["theta"]
           for c in ("c0", "c1", "c2")}
    mean = {n: sum(t[n] for t in one.values()) / 3 for n in theta}
    assert gap(made.go(1).state["theta"], mean) < 1e-12


def test_fedmom_is_momentum_on_the_pseudo_gradient(begin, gap):
    """FedMom's two sequences are Nesterov's with (1 + beta) v' - beta v, from v = theta_0."""
    got = begin("photon", server="fedmom", local=ONE)
    theta = v = got.state["theta"]
    for _ in range(3):
        other = begin("photon", server="fedavg", local=ONE)
        other.state, other.t = {"theta": theta}, getattr(got, "t", -1)
        g = sub(theta, other.go(1).state["theta"])
        new = add(theta, g, -0.7)
        theta, v = add(scale(new, 1.7), v, -0.7), new
        assert gap(got.go(1).state["theta"], theta) < 1e-10


# streaming_diloco

@pytest.mark.parametrize("space", ["lora", "full"])
def test_one_fragment_at_once_and_whole_is_diloco(begin, gap, space):
    got = begin("streaming_diloco", space=space, local=ADAM, fragments=1, bits=32, outer_lr=0.7).go(3)
    assert gap(got.state["theta"], begin("diloco", space=space, local=ADAM).go(3).state["theta"]) == 0


def test_fragments_cover_every_trainable_once_and_are_of_like_size(begin):
    theta = begin("fedavg", space="full").state["theta"]
    parts = fragments(theta, 2)
    assert sorted(n for p in parts for n in p) == sorted(theta)
    sizes = [sum(theta[n].numel() for n in p) for p in parts]
    assert max(sizes) / sum(sizes) < 0.56
    with pytest.raises(RecipeError, match=r"fragments = 3 does not divide the 2 layers .* allowed are 1, 2"):
        fragments(theta, 3)
    with pytest.raises(RecipeError, match="fragments = 1000000000 does not divide"):
        fragments(theta, 10**9)  # at once: a list for each had taken all memory first


def test_the_largest_message_and_all_bytes_fall(begin):
    """Half the model a message, and 4 bits a number with a scale of 16 bits for 128: 0.129 of fp32."""
    def up(name, **knobs):
        run = begin(name, dtype=torch.float32, space="full", local={**ADAM, "steps": 1}, **knobs).go(4)
        return [e["bytes"] for e in run.engine.record.events if e["kind"] == "wire" and e["direction"] == "up"]
    whole, half, few = up("diloco"), up("streaming_diloco", bits=32), up("streaming_diloco", bits=4)
    assert max(half) / max(whole) < 0.6
    assert sum(few) / sum(half) < 0.35  # of this tiny model's bytes many are padding and names


def test_a_step_lands_late_and_takes_the_place_of_what_was_learned_meanwhile(begin, gap):
    """With alpha 1 nothing lands in a client's own weights: it trains as if alone."""
    alone = begin("streaming_diloco", engine="in_process", local=ADAM, bits=32, alpha=1.0, delay=1).go(4)
    moved = begin("streaming_diloco", engine="in_process", local=ADAM, bits=32, alpha=0.0, delay=1).go(4)
    spread = lambda run: gap(run.engine.memory["c0"]["held"]["now"], run.engine.memory["c1"]["held"]["now"])  # noqa: E731
    assert spread(alone) > spread(moved)
    known = [moved.engine.memory[c]["held"]["known"] for c in ("c0", "c3")]
    assert gap(*known) == 0  # what all know is the same, bit for bit


def test_what_rounding_left_out_goes_with_the_fragments_next_step(begin, gap):
    run = begin("streaming_diloco", dtype=torch.float32, space="full", local=ADAM, bits=4).go(6)
    off = gap(run.state["goal"], run.state["theta"])
    assert 0 < off < 0.1 * gap(run.state["theta"], run.world.model.initial())


# sparse_loco

@pytest.mark.parametrize("space", ["lora", "full"])
def test_all_entries_as_they_are_without_memory_are_plain_outer_averaging(begin, gap, space):
    got = begin("sparse_loco", space=space, local=ADAM, k=4096, bits=32, beta=0.0).go(3)
    plain = begin("diloco", space=space, local=ADAM, outer_lr=1.0, outer_momentum=0.0).go(3)
    assert gap(got.state["theta"], plain.state["theta"]) == 0


@pytest.mark.parametrize("shape", [(5,), (64, 64), (3, 4099), (1,)])
@pytest.mark.parametrize("bits", [2, 8, 32])
def test_chunks_keep_the_largest_and_count_their_bytes(shape, bits):
    x, how = tree(shape), Chunks(4096, 64, bits)
    told = how.sparse(x)
    back = how.dense(told, x)["t0"]
    n = x["t0"].numel()
    kept = n // 4096 * 64 + math.ceil(64 * (n % 4096) / 4096)
    assert int((back != 0).sum()) <= kept == sum(how.kept(n))
    if bits == 32:
        assert int((back != 0).sum()) == kept and bool(((back == 0) | (back == x["t0"])).all())
        largest = x["t0"].reshape(-1)[:4096].abs()
        assert bool((back.reshape(-1)[:4096] != 0)[largest.topk(kept if n < 4096 else 64).indices].all())
    else:
        assert told["at"].numel() == 3 * math.ceil(kept / 2)  # 12 bits a place
        assert told["values"].numel() == math.ceil(kept / 8) * bits
        assert told["table"].numel() == 2**bits


def test_what_stays_behind_and_what_is_sent_are_the_whole_error(begin):
    """u = D + beta (u' - C'), and what did not count comes back whole: u = D + beta u'. Of D a run without memory
    tells, whose second round is from the same weights."""
    made = {"engine": "in_process", "dtype": torch.float32, "space": "full", "local": ADAM, "k": 400}
    first, bare, lost = begin("sparse_loco", **made).go(1), begin("sparse_loco", beta=0.0, **made).go(2), None
    kept = first.engine.memory["c0"]["error"]
    sent = first.method.chunks.dense(kept["sent"], kept["e"])
    lost = begin("sparse_loco", **made).go(1)
    lost.state = {**lost.state, "holds": {c: v for c, v in lost.state["holds"].items() if c != "c0"}}
    d = bare.engine.memory["c0"]["error"]["e"]
    for run, e in ((first, sub(kept["e"], sent)), (lost, kept["e"])):
        u = run.go(1).engine.memory["c0"]["error"]["e"]
        for n in u:
            assert torch.equal(u[n], torch.add(d[n], e[n], alpha=0.95)), n


def test_clients_make_the_very_step_of_the_server(begin, gap):
    run = begin("sparse_loco", engine="in_process", dtype=torch.float32, space="full", local=ADAM, loopback=True).go(2)
    theta = run.state["theta"]
    run.go(1)
    assert {c: gap(m["held"]["theta"], theta) for c, m in run.engine.memory.items() if "held" in m} == dict.fromkeys(
        ("c0", "c1", "c2", "c3"), 0)


def test_the_mean_over_senders_is_larger_where_few_send(begin, gap):
    start = begin("sparse_loco").state["theta"]
    moved = {a: gap(begin("sparse_loco", local=ADAM, average=a, k=200).go(1).state["theta"], start)
             for a in ("all", "senders")}
    assert moved["senders"] > moved["all"]


def test_twelve_bits():
    at = torch.tensor([0, 4095, 17, 2048, 1])
    assert torch.equal(of_twelve(twelve(at), 5), at)
    with pytest.raises(PayloadError, match="allowed is uint8"):
        of_twelve(twelve(at)[:-1], 5)


# codes and what clients hold

@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_off_by_half_a_scale_at_the_most(bits):
    x = tree((200,), (3, 50), (1,))
    told = coarse(x, bits)
    back, at = fine(told["codes"], told["scales"], x, bits), 0
    for n, t in x.items():
        count = math.ceil(t.numel() / 128)
        worst = told["scales"][at : at + count].float().max() / 2
        assert float((back[n] - t).abs().max()) <= float(worst) * (1 + 1e-6)
        at += count
    with pytest.raises(PayloadError, match="blocks of 128"):
        fine(told["codes"][1:], told["scales"], x, bits)


@pytest.mark.parametrize("name", ["streaming_diloco", "sparse_loco"])
def test_a_client_that_lost_what_it_held_is_told_all_in_the_next_round(begin, name):
    run = begin(name, engine="in_process", local=ADAM).go(2)
    for m in run.engine.memory.values():
        m.pop("held", None)
        break
    run.go(1)
    why = [e["why"] for e in run.engine.record.events if e["kind"] == "missing"]
    assert why and "must be told them whole" in why[0]
    assert len(run.go(1).state["holds"]) == 4 and set(run.state["holds"].values()) == {3}


@pytest.mark.parametrize("name", ["streaming_diloco", "sparse_loco", "prime_elastic"])
def test_layers_that_read_numbers_are_refused(name):
    with pytest.raises(CompositionError, match="do not fit together; use"):
        make_method(name).check_layers([CodecQuant()])


# async_diloco

def test_one_worker_at_a_time_and_n_1_is_diloco_of_one_client_a_round(begin, gap):
    got = begin("async_diloco", local=ADAM, delay=1, concurrency=1, dynamic=False).go(4)
    order = [next(e["client"] for e in got.engine.record.events if e["kind"] == "wire" and e["round"] == t
                  and e["direction"] == "up") for t in range(4)]
    one = begin("diloco", local=ADAM)
    for c in order:
        one.go(1, [c])
    assert gap(got.state["theta"], one.state["theta"]) < 1e-12


def test_momentum_waits_for_n_answers_and_takes_all_of_them(begin, gap):
    run = begin("async_diloco", local=ONE, delay=2, concurrency=1, dynamic=False).go(1)
    assert not any(t.any() for t in run.state["m"].values()) and any(t.any() for t in run.state["acc"].values())
    acc = run.state["acc"]
    run.go(1)
    assert not any(t.any() for t in run.state["acc"].values())
    assert gap(run.state["m"], zeros_like(acc)) > 0.4 * gap(acc, zeros_like(acc))


# prime_elastic

def test_without_faults_it_is_diloco(begin, gap):
    got = begin("prime_elastic", local=ADAM, quantize="none", loopback=True).go(3)
    assert gap(got.state["theta"], begin("diloco", local=ADAM).go(3).state["theta"]) < 1e-12
    assert got.state["version"] == 3 and not got.state["undone"]


def test_survivors_are_a_smaller_run_from_the_last_commit(begin, gap):
    run, other = (begin("prime_elastic", local=ADAM).go(2) for _ in range(2))
    run.go(1, ["c0", "c1", "c2"])
    other.state = {**other.state, "holds": {c: 2 for c in ("c0", "c1", "c2")}}
    other.go(1, ["c2", "c1", "c0"])
    assert gap(run.state["theta"], other.state["theta"]) < 1e-12


def test_who_joins_is_healed_within_a_round_from_a_member_and_bitwise_equal(begin, gap):
    run = begin("prime_elastic", engine="in_process", local=ADAM).go(2, ["c0", "c1", "c2"])
    run.go(1)
    asked = [(e["client"], e["phase"].partition(".")[2]) for e in run.engine.record.events
             if e["kind"] == "wire" and e["round"] == 2 and e["direction"] == "up"]
    assert ("c3", "heal") in asked and sum(p == "give" for _, p in asked) == 1 and ("c3", "local") not in asked
    assert gap(run.engine.memory["c3"]["next"]["theta"], run.engine.memory["c0"]["next"]["theta"]) == 0
    assert gap(run.engine.memory["c3"]["next"]["b"], run.state["b"]) == 0
    run.go(1)
    assert ("c3", 3) in {(e["client"], e["round"]) for e in run.engine.record.events if e["kind"] == "wire"
                         and e["phase"] == "PrimeElastic.local" and e["direction"] == "up"}


class Dies(InProcess):
    """The last worker is gone once it has sent its change, in the third round."""

    def work(self, job, submit):
        if self.round == 2 and job.client == "c3" and job.fold.ask.phase.endswith("vote"):
            return "gone between the reduction and the vote"
        return super().work(job, submit)


def test_a_worker_that_dies_before_its_vote_splits_no_commit(begin, gap):
    run = begin("prime_elastic", kind=Dies, local=ADAM).go(2)
    before = run.state["theta"]
    run.go(1)
    assert gap(run.state["theta"], before) == 0 and run.state["undone"] == 1 and run.state["version"] == 2
    run.go(1, ["c0", "c1", "c2"])  # the window again, by those who are left, from the last commit
    assert run.state["version"] == 3
    steps = {c: int(m["next"]["inner"]["step"]) for c, m in run.engine.memory.items() if c in ("c0", "c1", "c2")}
    assert set(steps.values()) == {9}  # of the window that did not count no inner step is left


class Against(InProcess):
    """One worker says something else after each step."""

    def answers(self, jobs):
        for job, reply in super().answers(jobs):
            if job.client == "c1" and job.fold.ask.phase.endswith(("vote", "heal")) and isinstance(reply, dict):
                reply = {**reply, "mark": 7}
            yield job, reply


def test_who_votes_against_all_others_is_asked_no_more(begin):
    run = begin("prime_elastic", kind=Against, local=ADAM, max_missed=2).go(6)
    assert run.state["missed"] == {"c1": 1} or run.state["missed"] == {"c1": 2}
    assert run.state["version"] >= 4


def test_fewer_workers_than_the_quorum_are_refused(begin):
    with pytest.raises(RecipeError, match="min_replicas = 5 is not allowed with 4 clients a round"):
        make_method("prime_elastic", min_replicas=5).check_clients(["a", "b", "c", "d"], 4)
    run = begin("prime_elastic", min_replicas=3)
    with pytest.raises(QuorumError, match="2 of 2 clients answered, 3 needed"):
        run.go(1, ["c0", "c1"])


# what is refused before a run

@pytest.mark.parametrize(("local", "rounds", "why"), [
    ({}, 4, "local.steps is not given"), ({"steps": 2}, 4, "must be < 2"),
    ({"steps": 3}, 5, "does not divide rounds = 5"),
])
def test_streams_that_cannot_be_scheduled_are_refused(local, rounds, why):
    with pytest.raises(RecipeError, match=why):
        make_method("streaming_diloco", fragments=2, delay=2).check_work(LocalSpec(**local), rounds)


def test_a_chunk_holds_what_is_kept_of_it():
    with pytest.raises(RecipeError, match=r"k = 65 is not allowed with chunk = 64; it must be <= 64"):
        make_method("sparse_loco", k=65, chunk=64)


@pytest.mark.parametrize("name", [n for n, m in registry.METHODS.ours.items() if ".pretraining." in m])
def test_none_of_them_takes_sites_of_another_architecture(name):
    assert not registry.method_class(name).mixes


def test_a_resumed_run_ends_where_the_other_did(begin, gap):
    """State and memories are all that a checkpoint keeps: another engine with both goes on in the very same way."""
    for name, knobs in (("streaming_diloco", {"delay": 1}), ("sparse_loco", {"k": 400}), ("prime_elastic", {})):
        whole, half = (begin(name, local=ADAM, **knobs).go(n) for n in (3, 1))
        other = begin(name, local=ADAM, **knobs)
        other.state, other.t, other.engine.memory = half.state, half.t, half.engine.memory
        assert gap(other.go(2).state["theta"], whole.state["theta"]) == 0
        drive(other.method.evaluate(other.state, other.world.infos(), "local"), other.engine)


RECIPE = {"model": {"name": "embedded", "weights": "random"}, "space": "full", "local": {"steps": 3}, "rounds": 4,
          "data": {"source": "office", "office": {"clients": 2, "rows": 8, "test_rows": 2, "client_test_rows": 0}}}


@pytest.mark.parametrize(("changes", "why"), [
    ({"method": {"name": "streaming_diloco", "fragments": 3}, "rounds": 6}, "does not divide the 4 layers"),
    ({"method": {"name": "streaming_diloco", "fragments": 2}, "rounds": 5}, "does not divide rounds = 5"),
    ({"method": "streaming_diloco", "local": {}}, "local.steps is not given"),
    ({"method": "diloco", "local": {"steps": 3, "over_rounds": "cosine_steps", "warmup": 12}}, "warmup = 12 is not"),
    ({"method": {"name": "prime_elastic", "min_replicas": 3}}, "min_replicas = 3 is not allowed with 2 clients"),
    ({"method": {"name": "decoupled_diloco", "quorum": 3}}, "quorum = 3 is not allowed with 2 clients"),
    ({"method": {"name": "decoupled_diloco", "fragments": 3}, "rounds": 6}, "does not divide the 4 layers"),
    ({"method": "decoupled_diloco", "local": {}}, "local.steps is not given"),
    ({"method": "fusionai"}, "backups = 1 is not allowed with 2 clients"),
    ({"method": "photon", "models": {"small": {"name": "minilm"}}, "clients": {"models": ["embedded", "small"]}},
     "small"),
])
def test_a_recipe_that_cannot_be_is_refused_before_it_runs(changes, why):
    with pytest.raises((RecipeError, CompositionError, ModelError), match=why):
        build(load_recipe({**RECIPE, **changes}))
