"""FDKT: the generator's training is private and booked, its texts are of every label alike, and groups cover them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from opacus.accountants import PRVAccountant

from fedllm.core.client import SERVER, Profile
from fedllm.core.errors import CompositionError, PayloadError, QuorumError, RecipeError
from fedllm.local.requests import Fit
from fedllm.methods._written import few_shots, grouped, one_line
from fedllm.methods.registry import make_method
from fedllm.models.endpoint import Completion
from fedllm.models.shelf import Shelf
from fedllm.wire.edge_energy import EdgeEnergy

KNOBS = {"texts": 2, "more": 1, "max_new_tokens": 4, "generator_steps": 5, "least_new": 0.0, "seed": 0,
         "embed": "tfidf"}


def begun(begin, **knobs):
    """Clients of one size: noise for a target is worked out once, which takes a second or two."""
    return begin("fdkt", engine="in_process", task="classification", sizes=(8, 8, 8, 8), **{**KNOBS, **knobs})


def watched(run):
    """The requests of two rounds' fits."""
    fits, kept = [], type(run.engine).work

    def work(self, job, submit):
        def look(request):
            fits.extend([request] if isinstance(request, Fit) else [])
            return submit(request)
        return kept(self, job, look)

    type(run.engine).work = work
    try:
        run.go(2)
    finally:
        type(run.engine).work = kept
    return fits


def test_the_generators_training_alone_is_private(begin):
    run = begun(begin)
    fits = watched(run)
    gen = run.world.models["generator"]
    assert {r.private is not None for r in fits if r.model is gen} == {True}
    assert {r.private is not None for r in fits if r.model is run.world.model} == {False}
    assert len([r for r in fits if r.model is gen]) == 4
    assert all(len(r.plan) == 5 for r in fits if r.model is gen)


@pytest.mark.slow  # opacus at 1e-3 takes seconds
def test_what_is_spent_is_no_more_than_the_target_and_as_opacus_counts_it(begin):
    run = begun(begin, seed=None).go(2)
    said = run.method.statement(run.state)
    assert max(said["clients"].values()) == said["epsilon"] <= 3.0 and not said["void"]
    for c in run.world.infos():
        [[z, sampling, rate, _, steps]] = run.engine.memory[c.id]["dp_sgd"]["releases"]
        assert (sampling, rate, steps) == ("poisson", 0.5, 5)
        theirs = PRVAccountant()
        theirs.history = [(z, rate, steps)]
        assert said["clients"][c.id] == pytest.approx(theirs.get_epsilon(1e-5, eps_error=1e-3), abs=1e-2)
        assert said["clients"][c.id] > 2.5  # noise for the target, and not for less


def test_a_seed_voids_the_promise_and_no_epsilon_promises_nothing(begin):
    run = begun(begin).go(1)
    assert run.method.statement(run.state)["void"] and run.method.statement(run.state)["epsilon"] == np.inf
    free = begun(begin, target_epsilon=None)
    assert {r.private for r in watched(free)} == {None} and free.method.statement(free.state) is None


def test_as_many_texts_of_each_label_leave_whoever_sends(begin):
    run, sent = begun(begin), []
    kept = type(run.engine).cross

    def cross(self, way, job, payload):
        assert way == "down" or "loss" not in payload  # which no ledger would hold
        if way == "up" and "texts" in payload and job.client != SERVER:
            sent.append(list(payload["of"]))
        return kept(self, way, job, payload)

    type(run.engine).cross = cross
    try:
        run.go(3)
    finally:
        type(run.engine).cross = kept
    assert len(sent) == 4  # once, and not again in the second round
    assert all(max(np.bincount(of, minlength=3)) <= 2 for of in sent)


def test_a_generator_that_repeats_itself_sends_nothing_and_what_it_spent_stands(begin):
    run = begun(begin, least_new=1.0, temperature=1e-6, seed=None).go(2)
    said = run.method.report(run.state)
    assert said["texts"] == 0 and set(said["withheld"]) == {"c0", "c1", "c2", "c3"}
    assert all("models.generator repeats itself" in why for why in said["withheld"].values())
    told = run.method.statement(run.state)
    assert set(told["clients"]) == set(said["withheld"]) and 2.5 < told["epsilon"] <= 3.0
    assert [len(run.engine.memory[c]["dp_sgd"]["releases"]) for c in said["withheld"]] == [1] * 4  # once, and not again


class Parrot:
    """A writer that says the same to all."""

    def complete(self, prompts, max_new_tokens, temperature=0.0, seed=0):
        return [Completion("well", None, 1, 1) for _ in prompts]


def test_a_writer_that_repeats_itself_is_no_round_and_nobody_spends_again(begin):
    """What the generators wrote and spent was another round's, which counts."""
    run = begun(begin, seed=None, least_new=0.2)
    named = run.world.models
    run.world.models = Shelf({"generator": lambda: named["generator"], "writer": Parrot})
    spent = run.go(1).method.statement(run.state)
    with pytest.raises(QuorumError, match=r"models.writer repeats itself"):
        run.go(1)
    run.engine.abandon()
    assert run.method.statement(run.state) == spent and run.state["stage"] == "write"


def test_who_was_asked_and_is_silent_takes_the_promise_away(begin):
    run = begun(begin, seed=None)
    run.engine.infos["c1"] = replace(run.engine.infos["c1"], profile=Profile(availability=1e-12))
    run.go(1)
    assert run.method.statement(run.state)["void"] == ["client 'c1' was asked without telling what it released"]


def test_groups_cover_all_texts_and_are_as_many_as_said():
    texts = [f"{word} {word} x{i}" for word in ("alpha", "omega", "kappa") for i in range(6)]
    group = grouped(texts, 6, "tfidf")
    assert len(group) == 18 and len(set(group)) == 3
    assert [len(set(group[i:i + 6])) for i in (0, 6, 12)] == [1, 1, 1]
    assert len(set(grouped(["same"] * 5, 2, "tfidf"))) == 1


def test_examples_are_of_the_text_s_own_group_and_label():
    texts, of, group = ["a0", "a1\n!", "b0", "c1"], [0, 1, 0, 1], np.array([0, 0, 1, 0])
    prompts, meant = few_shots(texts, of, group, ["zero:", "one:"], 2, 4, np.random.default_rng(0))
    assert len(prompts) == 8 and meant == [0, 1, 0, 1] * 2
    assert prompts[0] == "zero: a0\nzero:" and prompts[2] == "zero: b0\nzero:"
    assert sorted(prompts[1].splitlines()) == ["one:", "one: a1", "one: c1"] and prompts[1].endswith("\none:")
    assert one_line("\n \n x y \nz") == "x y" and one_line("  ") == ""


@pytest.mark.parametrize("bad", [{"of": [0, 7]}, {"of": [0]}, {"delta": 2.0}, {"rows": [[1.0, "much", 1.0, 0, 3]]},
                                 {"rows": [[1.0, "poisson", 0.5, 0, 3]], "delta": 0.0}])
def test_a_reply_that_is_none_is_refused(bad):
    good = {"texts": ["a", "b"], "of": [0, 2], "rows": [[1.0, "poisson", 0.5, 0, 3]], "delta": 1e-5, "why": ""}
    make_method("fdkt").fits({"classes": 3}, good)
    with pytest.raises(PayloadError):
        make_method("fdkt").fits({"classes": 3}, {**good, **bad})


def test_a_meter_beside_it_is_refused(begin):
    """It tells how many tokens a client's rows have."""
    with pytest.raises(CompositionError, match=r"'fdkt' with target_epsilon = 3 and 'edge_energy' do not fit together"):
        make_method("fdkt").check_layers([EdgeEnergy()])
    make_method("fdkt", target_epsilon=None).check_layers([EdgeEnergy()])


def test_a_delta_that_protects_nobody_is_refused(begin):
    with pytest.raises(RecipeError, match=r"delta"):
        begun(begin, target_delta=0.5).go(1)
    with pytest.raises(RecipeError, match=r"FDKT.target_epsilon = 0 is not allowed"):
        make_method("fdkt", target_epsilon=0)
