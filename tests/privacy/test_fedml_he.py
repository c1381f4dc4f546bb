"""Selective encryption: the mean is the plain mean, the map is the largest sensitivities, the rest is read."""

import pytest
import torch

from evidence.rigs.privacy import View, inversion
from fedllm.core.errors import CompositionError, RecipeError
from fedllm.core.program import drive
from fedllm.privacy.composition import clash
from fedllm.privacy.dp_fedavg import DPFedAvg
from fedllm.privacy.dp_sgd import DPSGD
from fedllm.privacy.fedml_he import FedMLHE, mask_of, top, unpack
from fedllm.privacy.he_ckks import HECKKS, split
from fedllm.wire import codec

ts = pytest.importorskip("tenseal")


def one_round(tiny, layers, **more):
    view = View()
    engine, m, state, world = tiny("fedavg", layers, k=3, **more)
    engine.begin(0)
    states = [x.init() for x in [*layers, view]]
    state = drive(m.round(state, world.infos()), engine, [*layers, view], states)
    return state, states, view.replies, world


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_the_round_is_the_plain_round_at_every_share(tiny, p):
    plain, _, (reply, *_), _ = one_round(tiny, [])
    layer = FedMLHE(encrypt_ratio=p)
    got, (state, _), replies, _ = one_round(tiny, [layer], loopback=True)
    for name, x in plain["theta"].items():
        torch.testing.assert_close(got["theta"][name], x, atol=2e-6, rtol=1e-5)
    d = sum(t.numel() for t in plain["theta"].values())
    mine = next(r for r in replies if "plain" in r)
    hidden = sum(int(b.sum()) for b in unpack(state["map"]).values())
    assert hidden == round(p * d) and len(mine["plain"]) == d - hidden
    boxes = -(-(hidden + len(mine["names"])) // 2048)  # 2048 values a ciphertext, whatever is in it
    assert 55_000 * boxes < mine["cipher"].numel() < 66_000 * boxes
    public = ts.context_from(layer.__dict__["_live"]["public"])
    assert not public.is_private()
    with pytest.raises(ValueError, match="secret"):
        ts.ckks_vector_from(public, split(mine)[0]).decrypt()
    assert codec.size(reply) > 4 * d  # what was compared with really was sent


@pytest.mark.parametrize("engine", ["in_process", "vectorized"])
def test_sensitivity_is_the_mean_size_of_each_row_s_own_gradient(tiny, engine):
    """Against one backward a row, and the map against their order."""
    from fedllm.models.batch import collate

    layer = FedMLHE(encrypt_ratio=0.2, rows=4)
    _, (state, _), _, world = one_round(tiny, [layer], engine=engine)
    model, total = world.model, {n: torch.zeros_like(t) for n, t in world.model.initial().items()}
    for info in world.infos():
        for row in world.encoded(info.id, "train")[:4]:
            theta = {n: t.clone().requires_grad_() for n, t in model.initial().items()}
            with model.using([theta]):
                grads = torch.autograd.grad(model.losses(collate([[row]], model.pad, model.device)).sum(),
                                            list(theta.values()), allow_unused=True)
            for n, g in zip(theta, grads, strict=True):
                total[n] += 0 if g is None else g.abs().cpu() / 4
    flat = torch.cat([total[n].reshape(-1) for n in sorted(total)])
    chosen = torch.cat([unpack(state["map"])[n].reshape(-1) for n in sorted(total)])
    least = flat[chosen].min()
    assert float(least) >= float(flat[~chosen].max()) - 1e-5 * float(flat.max())
    assert float(flat[chosen].sum()) > 0.5 * float(flat.sum())


def test_the_map():
    bits = top(torch.tensor([0.1, 3.0, 0.2, 3.0, 0.0]), 0.4)
    masks = unpack({"bits": bits, "of": [["a", 2], ["b", 3, 1]]})
    assert masks["a"].tolist() == [False, True] and masks["b"].flatten().tolist() == [False, True, False]
    assert mask_of(masks, "delta/a", (2,)) is masks["a"]
    assert mask_of(masks, "product/x", (2, 2)).all() and mask_of(masks, "delta/a", (3,)).all()  # unknown: all of it


def test_what_does_not_fit_is_refused():
    for layer in (DPFedAvg(noise_multiplier=1.0), DPSGD(noise_multiplier=1.0)):
        assert "read from rows without noise; use he_ckks" in (clash(layer, FedMLHE()) or "")
    with pytest.raises(RecipeError, match=r"encrypt_ratio = 1.5 is not allowed; it must be >= 0 and <= 1"):
        FedMLHE(encrypt_ratio=1.5)
    with pytest.raises(CompositionError, match=r"fedml_he.*'openfhe' do not fit together: it .*import.*tenseal works"):
        FedMLHE(backend="openfhe").check(None, {})
    with pytest.raises(CompositionError, match=r"he_ckks.*openfhe"):
        HECKKS(backend="openfhe").check(None, {})


def test_a_recipe_can_name_both(tmp_path):
    from fedllm.runs.layers import make_layer

    assert isinstance(make_layer("he_ckks", {}, "layers.0"), HECKKS)
    assert make_layer("fedml_he", {"encrypt_ratio": 0.5}, "layers.0").encrypt_ratio == 0.5


@pytest.mark.slow
def test_a_row_is_found_in_the_open_and_not_when_all_is_encrypted():
    """The dossier's rig: 8 tokens, 200 steps; recall 1.0 without protection."""
    assert inversion("fedavg", 0)["recall"] >= 0.9
    hidden = inversion("fedml_he", 0, knobs={"encrypt_ratio": 1.0})
    assert hidden["recall"] == hidden["rows_recall"] == 0.0
