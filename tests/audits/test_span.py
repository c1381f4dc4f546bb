"""The span test reads what the rank rule says, and nothing where it says nothing; noise and large sums close it."""

import pytest
import torch

import fedllm
from evidence.rigs.span import rank_rule, span
from fedllm.audits._span import Span, basis
from fedllm.audits.audit_run import audit_run


@pytest.mark.parametrize("how", [{"gpt": True}, {"rows": 2}, {"rows": 8, "length": 5}, {"rank": 16, "length": 8},
                                 {"rank": 16, "length": 8, "rounds": 2}])
def test_rows_are_read_word_for_word_in_their_order(how):
    got = span("att_dager", 3, **how)
    assert got["rouge_l"] == got["precision"] == got["recall"] == 1 > got["guess_recall"] and got["bag_errors"] == 0


def test_noise_large_sums_and_another_optimizer_close_it():
    for how in ({"layers": ("dp_sgd",)}, {"layers": ("secagg",), "clients": 8, "length": 32}, {"optimizer": "adamw"}):
        got = span("att_dager", 3, **how)
        assert got["recall"] == 0 and got["rank"] == got["width"] == 96


def test_a_secure_sum_of_few_inputs_hides_whose_rows_they_are_and_not_the_rows():
    got = span("att_dager", 3, layers=("secagg",), clients=4, length=8)
    assert got["recall_of_all"] == 1 and got["precision"] == pytest.approx(0.25) and got["rank"] < 96


def test_small_noise_tilts_the_span_and_large_noise_fills_it():
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(64, 10, generator=rng, dtype=torch.float64) @ torch.randn(10, 32, generator=rng,
                                                                                 dtype=torch.float64)
    noise = torch.randn(64, 32, generator=rng, dtype=torch.float64)
    shown = {size: basis(rows + size * noise) for size in (0.0, 1e-3, 10.0)}
    assert [columns.shape[1] for columns, _ in shown.values()] == [10, 10, 32]
    assert shown[0.0][1] < 1e-12 < 1e-4 < shown[1e-3][1]
    strict, tilted = (Span("x", c, None, slack).allows(1e-5, 500) for c, slack in list(shown.values())[:2])
    assert strict == 1e-5 < tilted < 0.05


@pytest.mark.parametrize("factor, inputs, errors", [("B", 6, 0), ("B", 7, 0), ("B", 8, 8), ("A", 8, 0), ("A", 9, 9)])
def test_the_rank_rule_at_rank_8(factor, inputs, errors):
    got = rank_rule("att_lora_leak", 3, factor=factor, inputs=inputs)
    assert got["errors"] == errors and got["told"] == (0 if errors else 1)


def one_step(recipe, **more):
    return {**recipe, "rounds": 1, "space": {"name": "lora", "rank": 16}, "clients": {}, "name": "leak",
            "local": {"optimizer": "sgd", "lr": 0.5, "steps": 1, "batch_size": 1},
            "data": {**recipe["data"], "partition": {"kind": "iid", "clients": 5}, "client_test": 0.0}, **more}


def test_the_audit_names_the_strongest_attack_and_what_it_needs(recipe, tmp_path):
    done = fedllm.run(one_step(recipe), root=tmp_path)
    found = audit_run(done.folder, only=["leak"])
    said, leak = found.checks[0].says, found.details["leak"]
    assert {"dager", "lora_leak"} <= set(leak["attacks"]) and leak["spans"]["verdict"] == "leaks"
    assert leak["attacks"]["dager"]["precision"] > 0.5 and leak["spans"]["rank"] < leak["spans"]["width"]
    assert "strongest" in said and "directions" in said and "a batch here has 1 rows" in said
    for seed in (None, 12, 16):  # of the last two the smallest singular value of a square factor is near zero by chance
        noise = {"name": "dp_sgd", "noise_multiplier": 2.0, "clip_norm": 1.0, "delta": 1e-3, "seed": seed}
        private = fedllm.run(one_step(recipe, layers=[noise]), root=tmp_path)
        hidden = audit_run(private.folder, only=["leak"]).details["leak"]
        assert hidden["spans"]["verdict"] != "leaks" and not hidden["attacks"]["dager"]["found"]


@pytest.mark.parametrize("shape", [(2, 2), (16, 16), (17, 16), (32, 16), (64, 64)])
def test_noise_alone_is_taken_for_a_span_once_in_a_hundred_draws_at_the_most(shape):
    """A square matrix of noise has a smallest singular value that is tiny by chance: no step that tells of inputs."""
    rng = torch.Generator().manual_seed(1)
    draws = torch.randn(1000, *shape, generator=rng, dtype=torch.float64)
    assert sum(basis(x)[0].shape[1] < shape[1] for x in draws) < 10
