"""Decoupled DiLoCo: streaming_diloco where all answer, and no barrier where they do not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from evidence.rigs.time import Race
from evidence.rigs.trials import Trial, _chain, _tiny_llama
from fedllm.core.ask import Ask
from fedllm.core.client import Fleet, Profile
from fedllm.core.errors import PayloadError, QuorumError, RecipeError
from fedllm.engines.in_process import InProcess
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.methods._radial import Collected, mean_of, radial, tallied
from fedllm.methods.registry import make_method
from fedllm.models.model import Model
from fedllm.spaces import make_space

KNOBS = {"fragments": 2, "delay": 1, "alpha": 0.25, "outer_lr": 0.5}


def world(speeds=(), fleet=None, **profile):
    """Rows of one length: every learner of equal speed makes as many steps on as many tokens."""
    model = Model(_tiny_llama(16, 0).double(), None, "generation", make_space("full"), seed=0)
    fed = _chain(0)
    fed = replace(fed, clients={c: replace(s, train=s.train[:8]) for c, s in fed.clients.items()})
    profiles = {c: Profile(speed=s, **profile) for c, s in zip(fed.clients, speeds, strict=False)}
    return World(model, fed, LocalSpec(optimizer="adamw", lr=0.01, steps=3, batch_size=4), 0, profiles, fleet=fleet,
                 exact_match=False)


@pytest.mark.parametrize("bits", [4, 32])
def test_with_all_learners_and_the_mean_it_is_streaming_diloco_to_the_bit(bits):
    plain = Trial("streaming_diloco", world(), {**KNOBS, "bits": bits}).rounds(5)
    ours = Trial("decoupled_diloco", world(), {**KNOBS, "bits": bits, "quorum": None, "merge": "mean"}).rounds(5)
    for name in ("theta", "goal", "b"):
        assert all(torch.equal(plain.state[name][n], t) for n, t in ours.state[name].items())
    sent = [t.engine.record.totals() for t in (plain, ours)]
    more = {way: (sent[1][way] - sent[0][way]) / (5 * 4) for way in ("up", "down")}  # bytes of a message
    assert all(0 <= more[way] <= 128 for way in more), more


def test_the_merge_of_orthogonal_changes_keeps_their_length_and_of_equal_ones_is_that_change():
    x, y = torch.zeros(8), torch.zeros(8)
    x[0], y[1] = 3.0, 3.0
    merged = radial([{"w": x}, {"w": y}], [1.0, 1.0])["w"]
    assert float(merged.norm()) == pytest.approx(3.0) and float(merged[0]) == pytest.approx(float(merged[1]))
    assert torch.allclose(radial([{"w": x}, {"w": x}], [1.0, 5.0])["w"], x)
    assert float(mean_of([{"w": x}, {"w": y}], [1.0, 1.0])["w"].norm()) == pytest.approx(3 / 2**0.5)
    assert torch.equal(radial([{"w": x}, {"w": y}], [1.0, 1.0], {"w"})["w"], (x + y) / 2)  # embeddings: the mean
    assert torch.equal(radial([{"w": x}, {"w": -x}], [1.0, 1.0])["w"], torch.zeros(8))  # opposed: no noise is blown up
    assert not torch.isnan(radial([{"w": x}, {"w": 0 * x}], [1.0, 1.0])["w"]).any()
    toward = radial([{"w": x}, {"w": y}], [9.0, 1.0])["w"]
    assert float(toward.norm()) == pytest.approx(3.0) and toward[0] > 5 * toward[1]


def test_a_learner_weighs_its_tokens_squared_over_its_steps_since_the_fragment_was_its_own():
    tree = {"w": torch.ones(1)}
    counts, weights = tallied({}, {"a": (tree, 100.0, 2.0), "b": (tree, 50.0, 1.0)}, 0, 2)
    assert weights == [5000.0, 2500.0] and counts == {"a": [[0, 0], [100, 2]], "b": [[0, 0], [50, 1]]}
    counts, weights = tallied(counts, {"a": (tree, 100.0, 2.0)}, 1, 2)
    assert weights == [200.0**2 / 4] and counts == {"a": [[100, 2], [0, 0]], "b": [[0, 0], [50, 1]]}


class Silent(InProcess):
    """One learner stops for good after so many answers."""

    who, after = "client-3", 2

    def work(self, job, submit):
        if job.client == self.who:
            self.after -= 1
            if self.after < 0:
                return "it stopped"
        return super().work(job, submit)


def test_a_learner_that_stops_blocks_nobody_and_one_that_was_away_is_told_what_it_missed():
    run = Trial("decoupled_diloco", world(), {**KNOBS, "quorum": 2}, Silent).rounds(3)
    assert run.state["version"] == 3 and run.state["holds"]["client-3"] == 1
    down = {c: next(m for m in [told(run)[c]]) for c in ("client-0", "client-3")}
    assert {k.partition("/")[0] for k in down["client-0"]} == {"version", "share", "step2"}
    assert {k.partition("/")[0] for k in down["client-3"]} == {"version", "share", "step1", "step2"}
    run.engine.after = 10**6
    run.rounds(1)
    assert run.state["holds"]["client-3"] == 3
    mine, other = (run.engine.memory[c]["held"] for c in ("client-3", "client-0"))
    assert all(torch.equal(mine["known"][n], t) for n, t in other["known"].items())  # caught up, to the bit
    assert not all(torch.equal(mine["now"][n], t) for n, t in other["now"].items())
    run.engine.after = 0
    run.rounds(3)
    assert "theta/lm_head.weight" in told(run)["client-3"]  # more than F missed: all of it


def told(run):
    ask = next(run.method.round(run.state, run.world.infos()))
    assert isinstance(ask, Ask)
    return ask.msgs


def test_too_few_answers_skip_a_round_and_a_quorum_above_the_learners_is_refused():
    run = Trial("decoupled_diloco", world(), {**KNOBS, "quorum": 4}, Silent).rounds(2)
    with pytest.raises(QuorumError, match="3 of 4 clients answered, 4 needed"):
        run.rounds(1)
    with pytest.raises(RecipeError, match=r"method\.quorum = 5 is not allowed with 4 clients a round"):
        make_method("decoupled_diloco", quorum=5).check_clients(list("abcd"), 4)


def raced(quorum, grace, speeds=(1.0, 1.0, 1.0, 1.0), late=0.0, **knobs):
    """Virtual time of three windows; the last learner's line is slow by so many seconds."""
    w = world(speeds, Fleet(step_seconds=1.0))
    w.profiles["client-3"] = replace(w.profiles["client-3"], latency=late)
    race = Race("decoupled_diloco", w, 4, {**KNOBS, "quorum": quorum, "grace": grace, **knobs})
    times = []
    for _ in range(3):
        before = race.engine.clock.now
        race.round()
        times.append(race.engine.clock.now - before)
    return times, race


def test_the_quorum_closes_a_window_and_grace_waits_within_the_slack():
    """Each window is 3 s of work; the last learner answers 2 x 0.2 s after the others."""
    all_of, race = raced(None, 0.0, late=0.2)
    assert all_of == pytest.approx([3.4] * 3) and race.state["holds"]["client-3"] == 2
    assert race.state["pace"] == 0 < raced(3, 0.5)[1].state["pace"]  # a state holds no time that decides nothing
    few, race = raced(3, 0.0, late=0.2)
    assert few == pytest.approx([3.0] * 3) and "client-3" not in race.state["holds"]
    some, race = raced(3, 0.5, late=0.2)  # slack: 1 step of 1 s, known from the second window on
    assert some == pytest.approx([3.0, 3.4, 3.4]) and race.state["holds"]["client-3"] == 2
    none, race = raced(3, 0.5, late=0.4)  # 0.8 s late, and 0.5 s are waited
    assert none == pytest.approx([3.0, 3.5, 3.5]) and "client-3" not in race.state["holds"]


def test_a_slow_learner_makes_its_share_of_the_steps_and_holds_nobody_up():
    times, race = raced(None, 0.0, speeds=(1.0, 3.0, 3.0, 3.0))
    assert times == pytest.approx([1.0] * 3) and set(race.state["holds"].values()) == {2}
    assert race.state["counts"]["client-0"][1][1] * 3 == race.state["counts"]["client-1"][1][1]


def test_what_does_not_fit_is_refused():
    method, like = make_method("decoupled_diloco", fragments=2, delay=1), {"w": torch.zeros(2)}
    for local, rounds, says in ((LocalSpec(), 4, "local.steps is not given"),
                                (LocalSpec(steps=1), 4, "delay = 1 is not"),
                                (LocalSpec(steps=3), 5, "fragments = 2 does not divide rounds = 5")):
        with pytest.raises(RecipeError, match=says):
            method.check_work(local, rounds)
    with pytest.raises(RecipeError, match=r"method\.fragments = 3 does not divide the 2 layers"):
        make_method("decoupled_diloco", fragments=3).init(world().model)
    fold = Collected(like, 32)
    for reply, says in (({"delta/w": torch.zeros(3), "tokens": 4, "steps": 1}, "'delta' holds 1 tensors"),
                        ({"delta/w": torch.zeros(2), "tokens": 4, "steps": 0}, "made 0 steps"),
                        ({"delta/v": torch.zeros(2), "tokens": 4, "steps": 1}, "not the 1 that")):
        with pytest.raises(PayloadError, match=says):
            fold.add([], reply)
    with pytest.raises(PayloadError, match="'codes' or 'scales' are lacking"):
        Collected(like, 4).add([], {"tokens": 4, "steps": 1})
