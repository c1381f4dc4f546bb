"""CreamFL, FedCola and prompts for VQA: what is averaged over whom, whose features count, and that nothing leaks."""

import random

import pytest
import torch

import fedllm
from fedllm.core.errors import CompositionError, DataError, RecipeError
from fedllm.data.federation import Federation, Shard
from fedllm.data.load import load_federation
from fedllm.engines import Vectorized
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.methods.multimodal.creamfl import ensemble
from fedllm.methods.registry import make_method
from fedllm.models.model import Model
from fedllm.models.pairs import OWN, SHARED
from fedllm.spaces import make_space
from fedllm.spaces.complement import AUX, SCALE
from fedllm.tasks.pairs import hashed
from tests.methods import applications
from tests.methods.conftest import Run, tried


def mixed(method, space, names="image-0 text-0 pair-0 image-1 pair-1", lr=0.1, **knobs):
    """Clients of all three kinds."""
    rnd, kinds = random.Random(3), {"image": "pixels", "text": "words"}
    made = {}
    for name in names.split():
        rows = [applications.pairs(rnd, n) for n in (6, 2)]
        part = kinds.get(name.partition("-")[0])
        made[name] = Shard(*(applications.kept(r, part) if part else r for r in rows))
    test, public = (applications.pairs(rnd, n) for n in (4, 5))
    fed = Federation(made, test, "pairs", applications.LABELS["pairs"], public)
    model = Model(applications.NETS["pairs"]().double(), None, "pairs", make_space(space), labels=fed.labels,
                  fast_kernels=False)
    world = World(model, fed, LocalSpec(optimizer="sgd", lr=lr, steps=2, batch_size=3))
    m = make_method(method, **knobs)
    run = Run(m, Vectorized((m,), world), world)
    run.state = m.init(model)
    return run


def test_what_is_shared_is_alike_in_both_kinds_and_the_rest_is_not():
    state = mixed("fedcola", "complement").go(1).state
    name = "image.blocks.0.{}.weight".format
    assert all(torch.equal(state["image"][name(w)], state["pair"][name(w)]) for w in ("q", "k", "v", "out"))
    assert not any(torch.equal(state["image"][name(w)], state["pair"][name(w)]) for w in ("up", "down"))
    assert state["kinds"]["text-0"] == "text" and not any(n.startswith("image.") for n in state["text"])


def test_without_sharing_and_without_aux_it_is_fedavg_within_each_kind(gap):
    both = mixed("fedcola", "complement", shared="none", aux=False).go(2).state
    for kind, ids in {"image": ["image-0", "image-1"], "text": ["text-0"], "pair": ["pair-0", "pair-1"]}.items():
        alone = mixed("fedcola", "complement", shared="none", aux=False).go(2, ids).state
        assert gap(both[kind], alone[kind]) < 1e-12


def test_a_text_client_never_changes_how_pictures_enter(gap):
    names = "image-0 pair-0 text-0"
    loud, quiet = (mixed("fedcola", "complement", names).go(1, ids.split()).state
                   for ids in (names, "image-0 pair-0"))
    enter = {k: {n: t for n, t in loud[k].items() if n.startswith("enter.image")} for k in ("image", "pair")}
    assert all(gap(enter[k], {n: quiet[k][n] for n in enter[k]}) == 0 for k in enter)


def test_the_other_modalitys_weights_are_seen_by_s_and_rest():
    run = mixed("fedcola", "complement")
    model, theta = run.world.model, run.state["image"]
    aux = run.method.other(run.state, "image")
    name = "image.blocks.0.q.weight"
    assert torch.equal(aux[name], run.state["text"]["text.blocks.0.q.weight"])
    assert run.method.other(run.state, "pair") is None
    rows = run.world.encoded("image-0", "train")
    from fedllm.models.batch import collate

    batch = collate([rows], 0, torch.device("cpu"))
    told = {**theta, **{SCALE + n: torch.full((1,), 0.5).double() for n in aux}, **{AUX + n: t for n, t in aux.items()}}
    by_hand = {n: t + 0.5 * aux[n] if n in aux else t for n, t in theta.items()}
    with torch.no_grad(), model.using([told]):
        z = model.class_logits(batch)
    with torch.no_grad(), model.using([by_hand]):
        assert torch.allclose(z, model.class_logits(batch), atol=1e-12)
    seen, emit = [], run.engine.record.emit
    run.engine.record.emit = lambda kind, **f: (seen.append(kind), emit(kind, **f))[1]
    local = run.go(1).state
    assert set(local["image"]) == set(theta)  # neither s nor W_aux is left in what is averaged
    assert "wire" in seen and "refused" not in seen


def test_whose_features_count_is_said_row_by_row():
    rng = torch.Generator().manual_seed(0)
    g = torch.nn.functional.normalize(torch.randn(6, 4, generator=rng), dim=-1)
    good, bad = g.clone(), -g
    assert torch.allclose(ensemble([good], g, 0.1, False), good)
    assert ensemble([], g, 0.1, False) is None
    mix = ensemble([good, bad], g, 0.1, False)
    assert ((mix - good).norm(dim=-1) < (mix - bad).norm(dim=-1)).all()
    assert torch.allclose(ensemble([good, bad], g, 0.1, True), torch.zeros(6, 4), atol=1e-7)
    by_row = torch.cat([good[:3], bad[3:]])
    mix = ensemble([by_row, bad], g, 0.05, False)
    assert torch.allclose(mix[3:], bad[3:], atol=1e-6) and (mix[:3] - good[:3]).norm() < 0.5


def test_features_cross_and_no_weights(gap):
    run = mixed("creamfl", "full", server_steps=1, contrast_steps=1)
    seen = []
    emit = run.engine.record.emit
    run.engine.record.emit = lambda kind, **f: (seen.append((kind, f)), emit(kind, **f))[1]
    run.go(2)
    up = {f["client"]: f["bytes"] for k, f in seen if k == "wire" and f["direction"] == "up" and f["round"] == 1}
    one = 5 * 8 * 8  # five public rows, eight wide, fp64
    assert one < up["image-0"] < one + 600 and 2 * one < up["pair-1"] < 2 * one + 600
    mine = run.engine.memory["text-0"]["theta"]
    assert not any(n.startswith("image.") for n in mine)
    assert not any(k == "refused" for k, _ in seen)


def test_reliability_sums_to_one_and_leaves_liars_and_strangers_out():
    m = make_method("prompt_medvqa")
    mine = torch.tensor([[1.0, 0.0]])
    others = [torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, -1.0]]), torch.tensor([[-1.0, 0.0]])]
    eta = m.reliability(others, [0.9, 0.3, 1.0], mine)
    assert eta.tolist() == pytest.approx([0.75, 0.25, 0.0])
    assert m.reliability(others, [0.9, 0.0, 1.0], mine).tolist() == pytest.approx([1.0, 0.0, 0.0])
    assert m.reliability(others[2:], [1.0], mine) is None and m.reliability(others, [0.0] * 3, mine) is None
    assert make_method("prompt_medvqa", weigh="uniform").reliability(others, [0.0] * 3, mine).tolist() == [1 / 3] * 3


def test_prompts_are_learned_the_shared_one_rests_and_models_stay(begin):
    run = begin("prompt_medvqa", **tried("prompt_medvqa")).go(2)
    told = run.method.shared(run.state, "c0")
    before = run.engine.memory["c0"]["theta"]
    assert set(run.state) == {"prompts", "accuracy"} and told.shape == before[OWN].shape
    run.go(1)
    after = run.engine.memory["c0"]["theta"]
    assert torch.equal(after[SHARED], told) and not torch.equal(after[OWN], before[OWN])
    assert all(0 <= a <= 1 for a in run.state["accuracy"].values())


def test_a_prompt_changes_what_is_said_and_its_absence_nothing():
    from fedllm.models.batch import collate

    run = mixed("prompt_medvqa", "full", "pair-0")
    model, rows = run.world.model, run.world.encoded("pair-0", "train")
    theta, batch = model.initial(), collate([rows], 0, torch.device("cpu"))
    said = []
    for leave in ((), (SHARED,), (OWN, SHARED)):
        with torch.no_grad(), model.using([{n: t for n, t in theta.items() if n not in leave}]):
            said.append(model.class_logits(batch))
    assert not torch.allclose(said[0], said[2]) and not torch.allclose(said[1], said[2])


SMALL = {"model": {"name": "pairs", "width": 8, "depth": 1, "prompts": 2}, "space": "full", "rounds": 1,
         "local": {"steps": 1, "batch_size": 4}}
GLYPHS = {"source": "sim:glyphs", "public": "sim:glyphs", "test": "sim:glyphs", "task": "pairs",
          "simulated": {"clients": 3, "rows": 12, "public_rows": 4, "test_rows": 6},
          "partition": {"kind": "by_key", "key": "client"}}


def test_recipes_of_both_worlds_run(tmp_path):
    cream = fedllm.run({**SMALL, "data": GLYPHS, "method": {"name": "creamfl", "server_steps": 1}}, root=tmp_path / "a")
    assert 0 <= cream.evaluation["global"]["r1"] <= 1
    assert set(cream.evaluation["clients"]) == {"image-0", "text-0", "pair-0"}
    with pytest.raises(CompositionError, match="space = 'complement'"):
        fedllm.run({**SMALL, "data": GLYPHS, "method": "fedcola"}, root=tmp_path / "b")
    scans = {"source": "sim:scans", "simulated": {"organs": 2, "rows": 12}, "task": "pairs", "test": 0.0,
             "partition": {"kind": "by_key", "key": "organ"}}
    vqa = fedllm.run({**SMALL, "data": scans, "method": "prompt_medvqa"}, root=tmp_path / "c")
    assert set(vqa.evaluation["clients"]) == {"liver", "lung"}
    with pytest.raises(fedllm.FedLLMError, match="without a picture or without a question"):
        fedllm.run({**SMALL, "data": {**GLYPHS, "public": 0.0}, "method": "prompt_medvqa"}, root=tmp_path / "d")


def test_rows_of_pictures_and_words(tmp_path):
    import json

    import numpy as np
    from PIL import Image

    Image.fromarray(np.full((20, 20, 3), 255, np.uint8)).save(tmp_path / "white.png")
    rows = [{"image": "white.png", "text": "A Red ring", "label": "ring"}, {"image": "white.png", "text": "a red RING",
                                                                           "label": "bar"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    spec = {"source": str(tmp_path / "rows.jsonl"), "task": "pairs", "test": 0.0,
            "partition": {"kind": "iid", "clients": 1}}
    fed = load_federation(spec, 0)
    from fedllm.models.made import Made, make_net

    world = World(make_net("pairs", Made(8, 1, fed.labels), make_space("full")), fed)
    one, two = world.encoded("client-00", "train")
    assert one.parts["pixels"].shape == (3, 16, 16) and one.parts["pixels"].max() == 1.0
    assert list(one.parts["words"]) == list(two.parts["words"]) == hashed("a red ring")
    for row, why in (({"label": "x"}, "neither an image nor a text"), ({"text": "...", "label": "x"}, "holds no word"),
                     ({"image": [[1.0, 2.0], [1.0]], "label": "x"}, "of one length"),
                     ({"image": "none.png", "label": "x"}, "no such file")):
        (tmp_path / "bad.jsonl").write_text(json.dumps(row))
        with pytest.raises(DataError, match=why):
            load_federation({**spec, "source": str(tmp_path / "bad.jsonl")}, 0)
    with pytest.raises(RecipeError, match=r"model\.picture = 18"):
        make_net("pairs", Made(8, 1, ("a", "b"), picture=18), make_space("full"))
