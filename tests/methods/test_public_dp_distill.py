"""Public rows for a private model: which are kept and by what score, from where it is learned again, and a teacher."""

import numpy as np
import pytest
import torch

from fedllm.core.client import SERVER
from fedllm.core.errors import CompositionError
from fedllm.core.payload import pack, part
from fedllm.core.program import serve
from fedllm.engines.carry import carry_out
from fedllm.engines.client import ClientCall, server_info
from fedllm.local.forward import run_probes
from fedllm.local.requests import Probe
from fedllm.methods.registry import make_method
from fedllm.models.model import Model
from fedllm.models.shelf import Shelf
from fedllm.spaces import make_space
from tests.methods.conftest import begin, llama

KNOBS = {"public_steps": 2, "match_rounds": 1, "keep": 0.4}


def call(run, phase="X.y"):
    return ClientCall(server_info(), run.world, {}, 0, phase, 1,
                      lambda request: carry_out([request], run.world.limits)[0], run.world.model)


def test_rows_are_kept_by_the_difference_of_likelihoods():
    run = begin("public_dp_distill", **KNOBS)
    mine = {n: t + 0.05 * torch.randn(t.shape, generator=torch.Generator().manual_seed(1)).to(t.dtype)
            for n, t in run.state["theta"].items()}
    said = serve([run.method], "PublicDPDistill.liked", pack(mine=mine, theirs=run.state["theta"]), call(run))
    rows = run.world.encoded(SERVER, "public")
    a, b = run_probes([Probe("x", run.world.model, mine, None, rows, (mine, run.state["theta"]))], run.world.limits)[0]
    score = (b.total - a.total) / a.count  # log p_mine - log p_theirs, per target
    assert said["kept"] == sorted(np.argsort(-score, kind="stable")[:2].tolist()) and len(rows) == 5


def test_what_was_kept_is_learned_from_the_first_weights_on_and_before_that_everything():
    run = begin("public_dp_distill", engine="in_process", **KNOBS)
    fits, fit = [], ClientCall.fit

    def seen(self, theta, **how):
        fits.append((self.id, theta, how.get("on")))
        return fit(self, theta, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClientCall, "fit", seen)
        run.go(3)
    server = [(theta, on) for who, theta, on in fits if who == SERVER]
    assert [len(on) for _, on in server] == [5, 2]
    first = run.state["first"]
    assert all(t.equal(first[n]) for theta, _ in server for n, t in theta.items())
    kept = run.state["kept"]
    assert [e.ids.tolist() for e in server[1][1]] == [run.world.encoded(SERVER, "public")[i].ids.tolist() for i in kept]
    assert run.method.report(run.state) == {"kept": 2}
    assert [who for who, *_ in fits].index(SERVER) == 0


def test_a_teachers_words_are_learned():
    """With mu = 1 the student ends nearer to the teacher's distribution at every target."""
    run = begin("public_dp_distill", space="full", mu=1.0, teacher="big", **{**KNOBS, "public_steps": 30})
    net = llama(torch.float64)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3), dtype=p.dtype))
    big = Model(net, run.world.model.tokenizer, "generation", make_space("full"), fast_kernels=False)
    run.world.models = Shelf({"big": lambda: big})
    told = serve([run.method], "PublicDPDistill.taught", pack(theta=run.state["theta"], kept=[]), call(run))
    rows = run.world.encoded(SERVER, "public")
    from fedllm.models.batch import collate

    batch = collate([list(rows)], 0, "cpu")

    def words(model, theta):
        with torch.no_grad(), model.using([theta]):
            return model.target_logits(batch)[1].log_softmax(-1)

    want = words(big, big.initial())
    far = [float(torch.nn.functional.kl_div(words(run.world.model, t), want, reduction="batchmean", log_target=True))
           for t in (run.state["theta"], part(told, "theta"))]
    assert far[1] < 0.7 * far[0]


def test_what_does_not_fit_is_refused():
    with pytest.raises(CompositionError, match="give both or none"):
        make_method("public_dp_distill", mu=0.5)
    with pytest.raises(CompositionError, match="learns text"):
        make_method("public_dp_distill").check(begin("fedavg", task="classification").world.model)
    method = make_method("public_dp_distill", mu=0.5, teacher="big")
    assert method.asks_for() == ("big",) and method.public_at() == ("server",)
