"""A client that is started again has lost the key: it is handed the same one in the next round, by whoever holds it."""

import pytest
import torch

from fedllm.core.errors import PayloadError, QuorumError, Withheld
from fedllm.core.layer import Facts
from fedllm.core.program import Fold, drive, serve
from tests.privacy.test_he_ckks import Ship

pytest.importorskip("tenseal")


class Sites:
    """Each client in a process of its own; one that is started again forgets what lived in it."""

    def __init__(self, layer, clients):
        self.clients, self.stacks, self.told, self.quorum = clients, {}, [], 1
        self.new = layer
        self.restart(*clients)

    def restart(self, *names):
        for name in names:
            self.stacks[name] = (Ship(), self.new())

    def send(self, asks):
        folds = [Fold(ask, self.quorum) for ask in asks]
        for fold in folds:
            for c, msg in fold.ask.msgs.items():
                self.told.append((fold.ask.phase.rpartition(".")[2], c))
                try:
                    fold.take(c, serve(self.stacks[c], fold.ask.phase, msg, self.clients[c]))
                except Withheld as why:
                    fold.miss(c, str(why))
        return [fold.done() for fold in folds]


@pytest.fixture
def town(people):
    """Make (a round of the coordinator's, the sites, the clients)."""
    from fedllm.privacy.he_ckks import HECKKS

    clients = people(5)
    facts = Facts(rows={c: v.n for c, v in clients.items()}, cohort=5, rounds=9)
    server, sites = HECKKS().bind(facts), Sites(lambda: HECKKS().bind(facts), clients)

    def round(*who):
        sites.told.clear()
        return drive(Ship().round(None, who or list(clients)), sites, [server])

    return round, sites, clients


def right(out, clients):
    """Whether the sum is that of who answered, and no noise of two keys."""
    mine = [clients[c] for c in out.answered]
    mean = sum(c.x * c.n for c in mine) / sum(c.n for c in mine)
    torch.testing.assert_close(out.value["delta/x"], mean, atol=1e-5, rtol=1e-4)
    return len(mine)


@pytest.mark.parametrize("who", [["c03"], ["c00"], ["c00", "c01"]], ids="+".join)
def test_who_was_started_again_is_in_the_next_round(town, who):
    round, sites, clients = town
    assert right(round(), clients) == 5
    context = sites.stacks["c04"][1].__dict__["_seats"]["c04"]["context"]
    sites.restart(*who)
    out = round()
    assert right(out, clients) == 5 - len(who) and set(out.missing) == set(who)
    assert all("was started again and holds the key of he_ckks no longer" in why for why in out.missing.values())
    assert right(round(), clients) == 5
    assert sites.stacks["c04"][1].__dict__["_seats"]["c04"]["context"] is context  # the key is the one that it was
    assert right(round(), clients) == 5 and {fn for fn, _ in sites.told} == {"local", "open"}


def test_the_giver_was_started_again_and_nobody_knew(town):
    """A newcomer asks for the key of a client that has lost it: another hands it on, and no second key comes up."""
    round, sites, clients = town
    assert right(round("c00", "c01", "c02", "c03"), clients) == 4
    sites.restart("c00", "c01")
    assert right(round(), clients) == 5
    assert [c for fn, c in sites.told if fn == "make_key"] == ["c00", "c01", "c02"]
    assert right(round(), clients) == 5


def test_where_all_were_started_again_a_round_is_lost_and_no_more(town):
    round, sites, clients = town
    assert right(round(), clients) == 5
    sites.restart(*clients)
    with pytest.raises(QuorumError, match="holds the key of he_ckks no longer; it is handed on"):
        round()
    assert right(round(), clients) == 5
    sites.quorum = 1.0  # the recipe's own quorum gives the round up, and not the layer
    sites.restart("c02")
    with pytest.raises(QuorumError, match=r"4 of 5 clients answered, 5 needed \(c02: "):
        round()
    assert right(round(), clients) == 5


def test_a_client_that_was_started_again_opens_nothing_and_makes_no_second_key(town):
    """What a coordinator that lies would ask of it: another's ciphertext, or a key beside that of the others."""
    round, sites, clients = town
    told = {"_he/lift": False, "_he/count": 5, "_he/unit": 1.0}
    assert right(round(), clients) == 5
    sealed = serve(sites.stacks["c02"], "Ship.local", told, clients["c02"])
    serve(sites.stacks["c01"], "Ship.local", told, clients["c01"])  # it may open one sum
    sites.restart("c01")
    with pytest.raises(PayloadError, match="opens one sum for each reply of its own, and has none"):
        serve(sites.stacks["c01"], "HECKKS.open", sealed, clients["c01"])
    round()
    assert right(round(), clients) == 5  # it has the key again, and its reply of that round is opened or spent
    with pytest.raises(PayloadError, match="opens one sum for each reply of its own, and has none"):
        for _ in range(2):
            serve(sites.stacks["c01"], "HECKKS.open", sealed, clients["c01"])
    sites.restart("c01")
    serve(sites.stacks["c01"], "HECKKS.advertise", {}, clients["c01"])
    with pytest.raises(Withheld, match="holds the key of he_ckks no longer"):
        serve(sites.stacks["c01"], "HECKKS.make_key", {"to": [], "keys": [], "held": 1}, clients["c01"])
    with pytest.raises(Withheld, match="holds the key of he_ckks no longer"):
        serve(sites.stacks["c01"], "Ship.local", told, clients["c01"])


def test_two_questions_at_the_first_start_come_to_one_key(people):
    from fedllm.privacy.he_ckks import HECKKS

    clients = people(6)
    facts = Facts(rows={c: v.n for c, v in clients.items()}, cohort=6, rounds=9)
    server, sites = HECKKS().bind(facts), Sites(lambda: HECKKS().bind(facts), clients)

    def both():
        return (yield [next(Ship().round(None, some)) for some in (list(clients)[:3], list(clients)[3:])])

    outs = drive(both(), sites, [server])
    assert [right(out, clients) for out in outs] == [3, 3]
    assert {c for fn, c in sites.told if fn == "make_key"} == {"c00"}  # who hands on the one key that there is
    assert right(drive(Ship().round(None, list(clients)), sites, [server]), clients) == 6
