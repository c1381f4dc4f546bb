"""Public steps at the server, private rounds at the clients, in turns."""

from __future__ import annotations


def test_without_public_steps_it_is_fedavg(begin, gap):
    assert gap(begin("ffm_lifecycle", central_steps=0).go(2).state["theta"],
               begin("fedavg").go(2).state["theta"]) < 1e-12


def test_public_steps_ask_no_client_and_private_ones_no_server(begin, gap):
    public = begin("ffm_lifecycle", learn="public", central_steps=2).go(1)
    assert public.up() == 0 and gap(public.state["theta"], public.world.model.initial()) > 0
    private = begin("ffm_lifecycle", learn="private", central_steps=2, local={"steps": 1}).go(1)
    more = begin("fedavg", local={"steps": 3}).go(1)
    assert gap(private.state["theta"], more.state["theta"]) == 0  # as many steps, all at the clients
    assert private.method.public_at() == () and public.method.public_at() == ("server",)


def test_the_server_rests_when_it_gets_no_better(begin):
    run = begin("ffm_lifecycle", central_steps=1, patience=1, local={"lr": 1e-12}).go(1)
    waited = [run.go(1).state["waited"] for _ in range(4)]
    assert max(waited) == 1 and run.method.report(run.state)["public_loss"] == run.state["best"]
