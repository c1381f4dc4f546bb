"""What a method is: a frozen dataclass whose fields are its knobs, with a card, and programs over clients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

from fedllm.core.ask import Ask, Program, Replies, on_client
from fedllm.core.card import Card, Claim, Moves, Trial
from fedllm.core.client import Client, ClientInfo
from fedllm.core.knobs import Knobs, knob
from fedllm.core.payload import Payload, Tree, pack, part

__all__ = ["Card", "Claim", "Knobs", "Method", "Moves", "Star", "State", "Trial", "knob"]
"""All that the file of a method needs of these rooms, by one import."""

State = Mapping[str, Any]


class Method(Knobs):
    """A federated method. Training methods have `init` and `round`; inference-time methods have `answer`."""

    card: ClassVar[Card]
    trial: ClassVar[Trial] = Trial()

    simulation_only: ClassVar[str] = ""
    """Why no real federation runs it: it sees what no deployment may (pooled data)."""

    by_arrival: ClassVar[bool] = False
    """Whether the result depends on who answers first: virtual time repeats that by the seed, real time does not."""

    only_fits: ClassVar[bool] = True
    """Whether its client functions learn from rows by `client.fit` alone. Where they read rows or losses beside it, no
    layer can make each row's part in the answer private (`dp_sgd`)."""

    only_text: ClassVar[bool] = False
    """Whether all that its clients say of their rows is text (and how many rows there are), so that a layer over text
    (`dp_text`) covers everything."""

    reads_ranks: ClassVar[bool] = False
    """Whether clients train the rank that their profiles declare; others train the space's own everywhere."""

    reads_rates: ClassVar[bool] = False
    """Whether it divides by the sum of the learning rates (`Fitted.lr_sum`), which must then be one for all."""

    mixes: ClassVar[Literal["", "models", "text"]] = ""
    """Whether clients may hold models of other designs than the server's, since no trainables cross: any `models` of
    ours, or whatever continues `text` (an endpoint). "": all hold the one model."""

    serves: ClassVar[bool] = True
    """False when the server ends with no model of its own: every client keeps and uses its own."""

    shares: ClassVar[bool] = False
    """Whether its clients answer with what their profiles' `shares` say: with `scores`, nothing that they send is text.
    """

    rows_change: ClassVar[bool] = False
    """Whether a site may go on with a run on other rows than it began with: what it made of them is brought up to date.
    """

    learns_from: ClassVar[Literal["rows", "environments", "logs", "words"]] = "rows"
    """What its clients must hold: rows, environments that a small policy acts in, environments in which logs are
    gathered for a decision transformer, or such in words, which a language model reads."""

    answers_for_clients: ClassVar[bool] = False
    """Whether it answers questions and `evaluate` still tests clients on their own rows: by what all answer together.
    """

    metrics: ClassVar[Mapping[str, Literal["max", "min"]]] = {}
    """The method's own metrics, by name, with the direction that is better: what `score` and `examine` return beside,
    or in place of, loss, accuracy and exact match."""

    @property
    def ends_with_judges(self) -> int:
        """How many judges of two answers it ends with, which a later stage may ask (`judges: STAGE`); 0: none."""
        return 0

    @property
    def noise_of_counts(self) -> float | None:
        """The noise multiplier of what clients answer that share counts alone; None: it has no such answers."""
        return None

    @property
    def repeats(self) -> int:
        """How often a round asks one client for the same function, at the most; a site counts its answers by it."""
        return 1

    def check(self, model: Any) -> None:
        """Raise CompositionError or ModelError when this method cannot work with the model's space or task."""

    def check_named(self, main: Any, models: Mapping[str, Any]) -> None:
        """Raise CompositionError when the method cannot work with the recipe's models beside the main one, by name;
        asked when a run is built, and of those alone that the method asks for."""

    def check_clients(self, ids: Sequence[str], cohort: int) -> None:
        """Raise RecipeError or CompositionError when the method cannot work with these clients, or so many a round."""

    def check_rows(self, labels: Sequence[str], rows: Mapping[str, Sequence[Any]]) -> None:
        """Raise DataError when the method cannot learn from the clients' training rows; asked in a simulation alone,
        since nobody sees those of a real federation."""

    def check_profiles(self, model: Any, clients: Sequence[ClientInfo]) -> None:
        """Raise RecipeError or CompositionError when the method cannot work with what clients declare of themselves;
        asked in a simulation before the first round, and by methods themselves where sites come as they like."""

    def check_work(self, local: Any, rounds: int) -> None:
        """Raise RecipeError when the method cannot work with so many rounds of what `local` has clients do."""

    def cautions(self, clients: int) -> Sequence[str]:
        """What may not be meant, with so many clients a round; shown as the run begins, and nothing is refused."""
        return ()

    def check_layers(self, layers: Sequence[Any]) -> None:
        """Raise CompositionError when the method is not what it says without other layers."""

    def at_client(self, model: Any) -> Any:
        """What a client sees of the model that it holds, where it is not all of it (`SERVER` always sees its own)."""
        return model

    def asks_for(self) -> Sequence[str]:
        """Names of the recipe's `models` that it uses; a run whose recipe lacks one is refused when it is built."""
        return ()

    def server_asks_for(self) -> Sequence[str]:
        """Names of the recipe's `models` that the server alone uses: no site loads them, or needs them."""
        return ()

    def public_at(self) -> Sequence[Literal["clients", "server"]]:
        """Who needs public rows (`data.public`): a run without is refused. Sites get them where `clients` need them."""
        return ()

    def init(self, model: Any) -> State:
        """The server's state before the first round; `model.initial()` gives the starting trainables."""
        return {"theta": model.initial()}

    def round(self, state: State, clients: Sequence[ClientInfo]) -> Program:
        """One round: yields Asks, returns the next state."""
        raise NotImplementedError

    def served(self, state: State) -> tuple[Tree, Tree | None]:
        """The model that would be deployed: trainables, and what was merged into the frozen base (or None)."""
        return state["theta"], None

    def modules(self, state: State) -> Mapping[str, Tree]:
        """Trainables that are deployed side by side on one backbone, by name, where no single ones are the model."""
        return {}

    def trained(self, state: State) -> Mapping[str, Tree]:
        """Trainables of the recipe's `models` that the server trained, by the model's name."""
        return {}

    def statement(self, state: State) -> Mapping[str, Any] | None:
        """What it can say of the run's privacy where it makes something private by itself, as a layer's statement."""
        return None

    def report(self, state: State) -> Mapping[str, Any] | None:
        """What the method adds to the run's result, under `reports`. None: nothing."""
        return None

    def evaluate(self, state: State, clients: Sequence[ClientInfo], on: str) -> Program:
        """Each client scores the model that it would use; `on` names the rows ("local" or "global"). Asked of `SERVER`
        with "global", it is the served model's own figure, by the same function."""
        theta, base = self.served(state)
        return (yield Ask(self.score, {c.id: pack(theta=theta, base=base, on=on) for c in clients}))

    def examine(self, state: State, clients: Sequence[ClientInfo], rows: Sequence[Any]) -> Program:
        """The server's figures on these rows (the global test), under the names of `metrics`; for methods whose figure
        is no score of one model. Where a method has none, the server is tested by the very `score` that clients are."""
        raise NotImplementedError

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg: Payload, client: Client) -> Payload:
        return client.score(part(msg, "theta"), base=part(msg, "base") or None, on=msg["on"])


class Star(Method):
    """The usual round: tell each client, let it work, merge the answers."""

    local: Callable[..., Any]

    def down(self, state: State, client: ClientInfo) -> Payload:
        """What this client is told."""
        return pack(theta=state["theta"])

    def merge(self, state: State, out: Replies) -> State:
        """The next state from the folded (or single) replies. The server may train here."""
        raise NotImplementedError

    def round(self, state: State, clients: Sequence[ClientInfo]) -> Program:
        out = yield Ask(self.local, {c.id: self.down(state, c) for c in clients})
        return self.merge(state, out)
