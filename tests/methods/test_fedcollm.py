"""FedCoLLM: without distillation it is FedAvg, and each lesson is the divergence from what the other said."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fedllm.core.errors import CompositionError
from fedllm.local.objectives.top_words import TopWords
from fedllm.methods._knowledge import knows
from fedllm.models.batch import collate
from fedllm.models.endpoint import Endpoint
from fedllm.models.shelf import Shelf

KNOBS = {"alignment": 4, "teach_steps": 2, "top_k": 8}


def test_without_distillation_it_is_fedavg(begin, gap):
    mine = begin("fedcollm", **KNOBS, distill_lambda=0.0)
    assert mine.method.public_at() == () and begin("fedcollm").method.public_at() == ("server",)
    plain = begin("fedavg").go(2)
    assert gap(mine.go(2).state["theta"], plain.state["theta"]) < 1e-10
    assert not mine.state["teacher"]


def test_the_large_model_learns_and_ends_as_a_product(begin, gap):
    run = begin("fedcollm", **KNOBS).go(1)
    held = run.world.models["teacher"]
    assert gap(run.state["teacher"], held.initial()) > 1e-6
    assert run.method.trained(run.state) == {"teacher": run.state["teacher"]}
    assert run.up() == begin("fedavg").go(1).up()  # what crosses is the small model's alone


def test_the_loss_is_ce_and_lambda_times_the_divergence_from_the_teacher(begin):
    """Against torch's own KL, with all words told."""
    run = begin("fedcollm", engine="in_process", **KNOBS)
    model, rows = run.world.model, run.world.encoded("c0", "public")
    theta = model.initial()
    other = {n: t + 0.3 * torch.randn(t.shape, generator=torch.Generator().manual_seed(1)) for n, t in theta.items()}
    batch = collate([rows], model.pad, model.device)

    class Asker:
        def measure(self, theta, rows, fn):
            with torch.no_grad(), model.using([theta]):
                return fn(model, batch).numpy()

    told = knows(Asker(), other, rows, 64, 2.0)
    most = max(len(w) for w, _ in told.top)
    side = {n: torch.stack([F.pad(x, (0, 0, 0, most - len(x))) for x in v]) for n, v in told.side().items()}
    with torch.no_grad(), model.using([theta]):
        rows_at, z, y = model.target_logits(batch)
        got, count = TopWords(weight=0.5, temperature=2.0).losses(model, batch, side)
    with torch.no_grad(), model.using([other]):
        t = model.target_logits(batch)[1]
    kl = F.kl_div((z / 2).log_softmax(-1), (t / 2).log_softmax(-1), reduction="none", log_target=True).sum(-1)
    each = F.cross_entropy(z, y, reduction="none") + 0.5 * 4 * kl
    assert got.tolist() == pytest.approx(torch.zeros(len(rows)).double().index_add(0, rows_at, each).tolist(), rel=1e-9)
    assert count.tolist() == [r.n_target for r in rows]


def test_a_teacher_that_reads_otherwise_or_cannot_be_trained_is_refused(begin):
    run = begin("fedcollm", **KNOBS)
    other = run.world.models["teacher"]
    names = type("Names", (), {"all_special_tokens": [], "eos_token_id": 2, "pad_token_id": 0,
                               "__len__": lambda self: 64,
                               "convert_ids_to_tokens": lambda self, ids: [f"x{i}" for i in ids]})()
    other.tokenizer, kept = names, other.tokenizer
    with pytest.raises(CompositionError, match=r"models.teacher has another vocabulary.*or method 'fedmkt'"):
        run.go(1)
    other.tokenizer = kept
    run = begin("fedcollm", **KNOBS)
    run.world.models = Shelf({"teacher": lambda: Endpoint("http://127.0.0.1:9/v1")})
    with pytest.raises(CompositionError, match=r"models.teacher: method 'fedcollm' trains it .* an endpoint"):
        run.go(1)
