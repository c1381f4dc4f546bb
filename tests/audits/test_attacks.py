"""Attacks by the server: they read what is there, say nothing where nothing is, and refuse what they cannot read."""

import numpy as np
import pytest
import torch
from torch import nn

from evidence.rigs.audit import decepticons, film, reading, small_gpt
from fedllm.audits.att_decepticons import Decepticons
from fedllm.audits.att_film import FILM
from fedllm.audits.att_gradient_inversion import Inversion, bigrams, moved
from fedllm.audits.recovered import compare, guess, rouge_l
from fedllm.audits.registry import audit_classes
from fedllm.core.errors import ModelError, RecipeError


def test_forged_weights_give_rows_away_and_honest_ones_do_not():
    forged = decepticons("att_decepticons", 3, rows=2, length=16)
    assert forged["pairs"] > 0.8 > forged["guess_recall"] and forged["precision"] > 0.95
    assert decepticons("att_decepticons", 3, rows=2, length=16, forged=False)["pairs"] <= 0.05


def test_noise_and_vetting_stop_forged_weights():
    for layers in (("dp_sgd",), ("vetting",)):
        assert decepticons("att_decepticons", 3, length=16, layers=layers)["pairs"] <= 0.02


def test_forging_leaves_the_network_alone_and_names_what_it_needs():
    net = small_gpt(0)
    before = {n: p.clone() for n, p in net.named_parameters()}
    Decepticons().forge(net)
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
    with pytest.raises(ModelError, match="forges GPT-2 networks, and this is Linear"):
        Decepticons().forge(nn.Linear(2, 2))
    with pytest.raises(ModelError, match="needs 31 dimensions in the first head"):
        Decepticons(tag=30).forge(net)


def test_rows_of_the_embedding_that_move_are_the_words():
    assert film("att_film", 1, rows=4)["bag_errors"] == 0
    assert film("att_film", 1, rows=4, space="lora")["recall"] == 0
    table = torch.zeros(50, 4)
    assert FILM().bag(table, tied=True) == [] == FILM().bag(table, tied=False)


def test_gradient_inversion_reads_one_row():
    got = reading("att_gradient_inversion", 0, steps=120)
    assert got["recall"] >= 0.75 > got["guess_recall"]


def test_variants_by_name_and_labels_that_must_be_known():
    assert Inversion.variant("dlg").labels == "search" and Inversion.variant("tag", steps=5).steps == 5
    with pytest.raises(RecipeError, match="'lam' is unknown; allowed are dlg, idlg, cos, tag, lamp"):
        Inversion.variant("lam")
    from evidence.rigs.privacy import tiny_encoder

    net = tiny_encoder(0)
    seen = {"classifier.bias": (torch.tensor([-1.0, 1.0]), torch.ones(2, dtype=torch.bool))}
    with pytest.raises(RecipeError, match="of 2 rows 'labels' must be given"):
        Inversion(steps=1).recover_rows(net, seen, 4, rows=2)
    assert Inversion(steps=1).recover_rows(net, {}, 4) == []


def test_moves_are_orders_and_bigrams_prefer_public_text():
    rng = torch.Generator().manual_seed(0)
    assert all(sorted(moved(7, rng)) == list(range(7)) for _ in range(200))
    prior = bigrams([[1, 2, 3]] * 20, 5)
    assert prior(torch.tensor([[1, 2, 3]])) < prior(torch.tensor([[3, 2, 1]]))


def test_recovery_is_counted_as_bags_and_rows_in_any_order():
    got = compare([[1, 2, 9], [5, 6]], [[5, 6, 6], [1, 2, 3]])
    assert got.recall == pytest.approx(4 / 6) and got.precision == pytest.approx(4 / 5)
    assert got.rouge_l == pytest.approx((4 / 5 + 4 / 6) / 2)
    assert compare([], [[1]]).recall == 0 == compare([], [[1]]).rouge_l
    assert rouge_l([1, 2, 3, 4], [1, 3, 4]) == pytest.approx(6 / 7)


def test_a_guess_takes_the_commonest_public_tokens():
    assert guess([[7, 7, 1], [7, 7, 2], [7, 3, 7]], [2, 3])[0] == [7, 7]
    rng = np.random.default_rng(0)
    public = [rng.choice(5, 6, p=[0.6, 0.1, 0.1, 0.1, 0.1]).tolist() for _ in range(200)]
    assert compare(guess(public, [6]), [public[0]]).recall > compare([[4] * 6], [public[0]]).recall


def test_every_audit_has_a_card_whose_claims_have_rigs():
    from evidence.claims import claimed, known_rigs

    assert {"att_decepticons", "att_film", "att_gradient_inversion", "att_attribute", "privacy_audit",
            "att_pipeline"} <= set(
        audit_classes()) <= set(claimed())
    for kind in audit_classes().values():
        card = vars(kind)["card"]
        assert all(c.rig in known_rigs() for c in (card.claim, *card.also.values()))


def test_networks_that_differ_learn_the_generator_s_backdoor():
    from evidence.rigs.distil import distilled

    got = distilled("att_fm_backdoor", 0, rounds=1, clients=2)
    assert got["success"] > 0.9 > 0.5 > got["control"]
