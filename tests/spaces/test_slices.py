"""Slices: cut, put back, averaged over who had each entry; and a network's blocks are smaller networks."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fedllm
from fedllm.core.errors import CompositionError, ModelError, PayloadError
from fedllm.core.payload import pack, zeros_like
from fedllm.methods.registry import make_method
from fedllm.models.load import load_model
from fedllm.privacy.secagg import SecAgg
from fedllm.spaces import make_space
from fedllm.spaces.slices import Covered, Slice, blocks, joined
from tests.methods.conftest import begin, gap, llama

THETA = {"a": torch.arange(12.0).view(4, 3), "b": torch.arange(4.0), "c": torch.ones(2, 2)}


def test_take_and_put():
    view = Slice(("a", "b"), rows={"a": [2, 0], "b": [1]}, columns={"a": torch.tensor([1, 2])})
    sub = view.take(THETA)
    assert sub["a"].tolist() == [[7, 8], [1, 2]] and sub["b"].tolist() == [1] and set(sub) == {"a", "b"}
    put = view.put(THETA, {n: t + 100 for n, t in sub.items()})
    assert put["a"].tolist() == [[0, 101, 102], [3, 4, 5], [6, 107, 108], [9, 10, 11]] and put["c"] is THETA["c"]
    assert THETA["a"][0, 1] == 1  # the trainables themselves are as they were
    assert Slice().take(THETA).keys() == THETA.keys()


@pytest.mark.parametrize(("view", "why"), [
    (Slice(rows={"a": [4]}), "rows of 'a' are not all among its 4"),
    (Slice(rows={"a": [-1]}), "not all among its 4"),
    (Slice(columns={"a": [3]}), "columns of 'a' are not all among its 3"),
    (Slice(rows={"a": [1, 1]}), "name one twice"),
    (Slice(columns={"b": [0]}), "columns of 'b' are not all among its 0"), (Slice(("d",)), "names 'd', which is not"),
    (Slice(rows={"d": [0]}), "names 'd', which is not"), (Slice(("b",), rows={"a": [0]}), "names 'a', which is not"),
    (Slice(rows={"a": []}), "not all among")])
def test_a_slice_that_does_not_fit_is_refused_by_name(view, why):
    with pytest.raises(PayloadError, match=why):
        view.take(THETA)


def test_what_is_put_must_be_of_the_slices_shape():
    view = Slice(("a",), rows={"a": [0]})
    with pytest.raises(PayloadError, match=r"'a': the slice has shape \(1, 3\), what is put into it \(2, 3\)"):
        view.put(THETA, {"a": torch.ones(2, 3)})
    with pytest.raises(PayloadError, match="differ in names, for example 'b'"):
        view.put(THETA, {"a": torch.ones(1, 3), "b": torch.ones(4)})


def said(view, value, n):
    return pack(delta={k: torch.full_like(t, value) for k, t in view.take(THETA).items()}, at=view.places(THETA), n=n,
                loss=value)


ONE, OTHER = Slice(("a",), rows={"a": [0, 1]}), Slice(("a", "b"), rows={"a": [1, 2]}, columns={"a": [0, 2]})


@pytest.mark.parametrize("lifted", [False, True])
def test_every_entry_is_the_mean_over_who_had_it(lifted):
    mean, acc = Covered(), {}
    for reply in (said(ONE, 1.0, 1), said(OTHER, 5.0, 3)):
        acc = mean.plus(acc, mean.lift(reply)) if lifted else mean.add(acc, reply)
    out = mean.done(acc)
    assert out["delta/a"].tolist() == [[1, 1, 1], [4, 1, 4], [5, 0, 5], [0, 0, 0]]  # (1 * 1 + 5 * 3) / 4 = 4
    assert out["cover/a"].tolist() == [[1, 1, 1], [4, 1, 4], [3, 0, 3], [0, 0, 0]]
    assert out["delta/b"].tolist() == [5] * 4 and not out["delta/c"].any() and not out["cover/c"].any()
    assert out["loss"] == 4.0 and out["n"] == 4.0


def test_a_reply_that_does_not_fit_changes_nothing():
    mean = Covered()
    acc = mean.add({}, said(ONE, 1.0, 1))
    before = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in acc.items()}
    good = said(OTHER, 5.0, 3)
    for bad, why in (({"at/rows/a": torch.tensor([1, 9])}, "rows of 'a' are not all among its 4"),
                     ({"at/shape/a": [9, 3]}, "cut from other trainables"),
                     ({"delta/a": torch.ones(1, 2)}, "its slice"),
                     ({"at/rows/z": torch.tensor([0])}, "names 'z'"), ({"more": 1.0}, "names differ")):
        with pytest.raises(PayloadError, match=why):
            mean.add(acc, {**good, **bad})
    assert all(torch.equal(acc[k], v) if isinstance(v, torch.Tensor) else acc[k] == v for k, v in before.items())
    with pytest.raises(PayloadError, match="add up to 0"):
        mean.done(mean.add({}, said(ONE, 1.0, 0)))


def test_a_block_is_a_smaller_network():
    """The weights of one block and zeros beside compute, and learn, what a Llama of half the width does."""
    net = llama()
    theta = {n: p.detach().clone() for n, p in net.named_parameters()}
    for view in blocks(net, theta, 2):
        sub = view.take(theta)
        small = LlamaForCausalLM(LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, head_dim=4,
            num_key_value_heads=1, max_position_embeddings=64)).double()
        small.load_state_dict(sub)
        net.load_state_dict(view.put(zeros_like(theta), sub))
        ids = torch.arange(3, 19).view(2, 8)
        losses = [m(input_ids=ids, labels=ids).loss for m in (small, net)]
        assert torch.allclose(*losses, atol=1e-12)
        for m, loss in zip((small, net), losses, strict=True):
            m.zero_grad()
            loss.backward()
        grads = {n: p.grad for n, p in net.named_parameters()}
        assert gap(view.take(grads), {n: p.grad for n, p in small.named_parameters()}) < 1e-12
        assert gap(grads, view.put(zeros_like(grads), view.take(grads))) == 0.0  # nothing moves outside of the block
        net.load_state_dict(theta)


def test_blocks_share_nothing_and_together_are_all(tiny_bert_folder):
    model = load_model(tiny_bert_folder, "classification", make_space("full"), labels=("x", "y"))
    theta, cuts = model.initial(), blocks(model.net, model.initial(), 4)
    query = "body.encoder.layer.0.attention.self.query.weight"
    assert [c.take(theta)[query].shape for c in cuts] == [(8, 32)] * 4
    assert gap(joined(cuts).take(theta), theta) == 0.0
    held = sum(t.numel() for t in cuts[0].take(theta).values())
    assert held < sum(t.numel() for t in theta.values())
    with pytest.raises(ModelError, match="has 4 heads or neurons, which are no 3 equal blocks"):
        blocks(model.net, theta, 3)
    with pytest.raises(ModelError, match="could be dealt out"):
        blocks(model.net, {n: t for n, t in theta.items() if "classifier" in n}, 2)


def test_engines_agree_and_every_block_is_trained_as_often():
    for task in ("generation", "classification"):
        for dtype, near in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
            one, other = (begin("fedbrb", engine=e, space="full", dtype=dtype, task=task, n_blocks=2).go(2)
                          for e in ("in_process", "vectorized"))
            assert gap(one.state["theta"], other.state["theta"]) < near
            assert other.state["trained"] == [2, 2]
            assert gap(other.state["theta"], other.world.model.initial()) > 1e-4
    for clients in (["c0"], ["c0", "c1"]):  # as many rounds as there are blocks
        assert begin("fedbrb", space="full", n_blocks=2, broadcast_weight=0.0).go(2, clients).state["trained"] in (
            [1, 1], [2, 2])


def test_one_block_is_fedavg_to_the_bit():
    one = begin("fedbrb", space="full", dtype=torch.float32, n_blocks=1).go(2)
    other = begin("fedavg", space="full", dtype=torch.float32).go(2)
    assert gap(one.state["theta"], other.state["theta"]) == 0.0


def test_uncovered_blocks_stay_and_static_slices_never_reach_them():
    run = begin("fedbrb", space="full", n_blocks=2, rolling="static", broadcast_weight=0.0)
    start, (first, second) = run.state["theta"], blocks(run.world.model.net, run.state["theta"], 2)
    run.go(2)
    cut = [n for n in second.rows] + [n for n in second.columns]
    before, after = second.take(start), second.take(run.state["theta"])
    assert all(torch.equal(before[n], after[n]) for n in cut) and run.state["trained"] == [2, 0]
    assert any(not torch.equal(first.take(start)[n], first.take(run.state["theta"])[n]) for n in cut)


def test_broadcast_draws_blocks_together_but_leaves_what_is_not_cut():
    method = make_method("fedbrb", n_blocks=2, broadcast_weight=0.5, broadcast_decay="none")
    net = llama()
    theta = {n: p.detach().clone() for n, p in net.named_parameters()}
    cuts = blocks(net, theta, 2)
    mixed = method.broadcast(theta, cuts, [1.0, 3.0], 0)
    name = "model.layers.0.mlp.up_proj.weight"
    a, b = theta[name].chunk(2)
    assert torch.allclose(mixed[name], torch.cat([a / 2 + (a + 3 * b) / 8, b / 2 + (a + 3 * b) / 8]))
    assert torch.equal(mixed["model.embed_tokens.weight"], theta["model.embed_tokens.weight"])


def test_sums_hide_who_had_which_block():
    """The mean over who had each entry is a sum, so secure aggregation computes it."""
    plain = begin("fedbrb", space="full", n_blocks=2, broadcast_weight=0.0).go(1)
    run = begin("fedbrb", space="full", n_blocks=2, broadcast_weight=0.0, layers=(SecAgg(),))
    from fedllm.core.layer import Facts

    layer = run.engine.stack[1].bind(Facts({c.id: c.n for c in run.world.infos()}, 4, 1, run.world.local))
    run.engine.stack = (run.method, layer)
    from fedllm.core.program import drive

    run.engine.begin(0)
    state = drive(run.method.round(run.state, run.world.infos()), run.engine, [layer], [layer.init()])
    assert gap(state["theta"], plain.state["theta"]) < 1e-4
    assert gap(plain.state["theta"], run.world.model.initial()) > 1e-3


@pytest.mark.parametrize("layer", ["dp_fedavg", "median", "codec_quant", "thgs_secagg"])
def test_layers_that_would_spoil_the_division_are_refused(recipe, tmp_path, layer):
    knobs = {"noise_multiplier": 1.0} if layer == "dp_fedavg" else {}
    recipe |= {"space": "full", "method": {"name": "fedbrb", "n_blocks": 2}, "layers": [{"name": layer, **knobs}]}
    with pytest.raises(CompositionError, match="divides what is summed by the weight of who had it"):
        fedllm.run(recipe, root=tmp_path)


def test_a_run_of_fedbrb_from_recipe_to_model(recipe, tmp_path):
    recipe |= {"space": "full", "method": {"name": "fedbrb", "n_blocks": 2}, "rounds": 2, "layers": ["secagg"]}
    result = fedllm.run(recipe, root=tmp_path)
    assert result.reports["FedBRB"] == {"rounds_in_which_each_block_was_trained": [2, 2]}
    assert result.adapter_path.name == "model" and not result.skipped


def test_what_fedbrb_cannot_cut_is_refused():
    with pytest.raises(CompositionError, match="space 'lora' do not fit together: it cuts the network's own weights"):
        begin("fedbrb", space="lora", n_blocks=2)
    with pytest.raises(ModelError, match="which are no 4 equal blocks"):
        begin("fedbrb", space="full", n_blocks=4)
    with pytest.raises(ValueError, match="blocks_per_client = 3 is not allowed; it must be <= n_blocks = 2"):
        make_method("fedbrb", n_blocks=2, blocks_per_client=3)


def test_a_client_sends_its_block_and_what_is_whole():
    run = begin("fedbrb", space="full", n_blocks=2, dtype=torch.float32).go(1)
    theta = run.state["theta"]
    cut = blocks(run.world.model.net, theta, 2)[0]
    want = sum(4 * t.numel() for t in cut.take(theta).values())
    whole = sum(4 * t.numel() for t in theta.values())
    sent = [e["bytes"] for e in run.engine.record.events if e["kind"] == "wire" and e["direction"] == "down"]
    assert all(want < b < want + 6000 for b in sent) and want < whole
