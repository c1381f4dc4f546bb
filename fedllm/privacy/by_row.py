"""DP-SGD of one fit of a method's own, of which alone something may leave (FDKT); other work stays at its client."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fedllm.core.errors import CompositionError
from fedllm.core.form import need
from fedllm.core.layer import name_of
from fedllm.privacy.accountant import Ledger, check_delta, noise_for, usual_delta
from fedllm.privacy.dp_sgd import BOOK, DPSGD


@contextmanager
def private_fits(client: Any, steps: int, epsilon: float | None, delta: float | None, clip: float, seed: int | None
                 ) -> Iterator[float]:
    """Inside, every fit of this client is DP-SGD with noise for `epsilon` over `steps` steps, and anything else that
    asks its model is refused; gives delta. What is spent is booked in the client's memory and, at a site, in its
    ledger, before the fit begins. With no `epsilon` nothing is private, and delta is 0."""
    if epsilon is None:
        yield 0.0
        return
    if delta is not None:
        check_delta(delta, client.n)
    delta = delta or usual_delta(client.n)
    rate = min(1.0, client.training.lot / client.n)
    z = noise_for(epsilon, delta, steps, "poisson" if rate < 1 else "none", rate)
    layer = DPSGD(noise_multiplier=z, clip_norm=clip, delta=delta, seed=seed)
    with client.through(lambda request: layer._private(request, client)):
        yield delta


def booked(client: Any) -> list[list[Any]]:
    """The rows of this client's ledger: noise, rates and counts, which say nothing of its data."""
    return [list(row) for row in client.memory.get(BOOK, {}).get("releases", [])]


def need_book(reply: Mapping[str, Any]) -> None:
    """PayloadError for a reply whose `rows` are no ledger's, or whose `delta` is none (0: nothing was private)."""
    DPSGD.fits(None, {}, reply)  # type: ignore[arg-type]
    need(0 <= reply["delta"] < 1 and (reply["delta"] > 0 or not reply["rows"]), "'delta' is not from 0 to 1")


def spent_by(books: Mapping[str, Sequence[Sequence[Any]]], deltas: Mapping[str, float], seeded: bool, owner: str,
             silent: Sequence[str]) -> dict[str, Any]:
    """A statement of what each client's fits spent; the run's epsilon is the largest: they hold other rows."""
    each = {c: Ledger({"releases": [list(r) for r in rows]}).epsilon(deltas[c]) for c, rows in sorted(books.items())
            if deltas[c]}
    void = [f"{owner}.seed is set, so whoever knows the recipe can take the noise off"] if seeded else []
    void += [f"client '{c}' was asked without telling what it released" for c in silent]
    return {"layer": owner, "unit": "example", "epsilon": float("inf") if void else max(each.values(), default=0.0),
            "delta": max(deltas.values(), default=0.0), "clients": each, "adjacency": "one training row more or less",
            "sampling": "poisson", "void": void,
            "not_covered": "how many rows a client has; evaluation on held-out rows"}


def need_silence(layers: Sequence[Any], owner: str, epsilon: float | None) -> None:
    """CompositionError for a layer that tells something of clients' rows by itself, beside what is made private."""
    for layer in layers if epsilon is not None else ():
        if layer.algebra.reads:
            raise CompositionError(
                f"method '{owner}' with target_epsilon = {epsilon:g} and '{name_of(layer)}' do not fit together: "
                f"it tells what clients' rows cost, without noise; {layer.algebra.instead or 'leave it out'}")
