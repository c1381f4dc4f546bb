"""Open a run at its sites: what each is told, what it says of itself, and who takes no part."""

from __future__ import annotations

import logging
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fedllm.core.errors import RecipeError, RunFailed, plain
from fedllm.core.form import KINDS
from fedllm.engines.far.line import Silence
from fedllm.engines.far.reasons import sentence
from fedllm.engines.far.sites import PROTOCOL, Sites
from fedllm.federation.admission import NOT_SENT
from fedllm.federation.public import MOST, PublicRows
from fedllm.methods.registry import make_method
from fedllm.runs.profiles import check_profile
from fedllm.runs.recipe import Recipe
from fedllm.runs.resolved import versions

log = logging.getLogger(__name__)


class Opening:
    """Opens (and after a site's restart reopens) one run at its sites."""

    def __init__(self, sites: Sites, recipe: Recipe, run: str, at: int, public: PublicRows | None = None) -> None:
        """`public` are rows that sites must have."""
        self.sites, self.recipe, self.public = sites, recipe, public
        self.shipped: dict[str, int] = {}
        """Bytes of public rows that were sent, by site."""
        self.said: dict[str, Mapping[str, Any]] = {}
        self.head = {"op": "open", "protocol": PROTOCOL, "run": run, "at": at, "incarnation": uuid.uuid4().hex,
                     "recipe": for_sites(recipe), "versions": versions(), "sites": sorted(sites.table),
                     "public": public and public.head}
        sites.reopen = self.one

    def one(self, site: str) -> None:
        """One site loads its model; raises Silence with the site's own reason when it refuses."""
        ends = time.monotonic() + self.sites.patience.opening
        while self.sites.probe(site) is None:  # its process may still be starting
            if time.monotonic() > ends:
                raise Silence(f"its process did not start in {self.sites.patience.opening:g} s")
            time.sleep(0.2)
        # A process that is started again keeps what counted; only the run's first process there drops later rounds.
        told = {**self.head, "at": None} if site in self.said else self.head
        head, _ = self.sites.link.call(site, told, b"", self.sites.patience.opening)
        if head.get("lacks") == "public" and self.public is not None:
            head = self._ship(site, told, self.public)
        if "refused" in head:
            raise Silence(plain(f"refused by the site: {sentence(head['refused'])}"))
        if why := odd(head, sorted(self.sites.table)):
            raise Silence(plain(f"what it says of itself is refused: {why}"))
        self.sites.table[site].boot = str(head["boot"])
        self.said[site] = head

    def _ship(self, site: str, told: Mapping[str, Any], public: PublicRows) -> Mapping[str, Any]:
        """Open once more, with the public rows, which the site keeps."""
        if len(public.data) > MOST:
            raise Silence(f"it has no copy of the public rows, and their {len(public.data)} bytes are more than the "
                          f"{MOST} that are sent; give it a copy (`fedllm join --public FILE`)")
        if site in self.said:  # the record of the run is open: it reads what is noticed of sites
            self.sites.on_event("public_rows_sent_again", client=site, bytes=len(public.data))
        else:
            self.shipped[site] = len(public.data)
        return self.sites.link.call(site, told, public.data, self.sites.patience.opening)[0]

    def all(self, needed: int) -> dict[str, str]:
        """Open everywhere at once; returns who does not take part and why. RunError when fewer than `needed` do."""
        names = list(self.sites.table)
        with ThreadPoolExecutor(len(names)) as pool:
            out = {n: why for n, why in zip(names, pool.map(self._try, names), strict=True) if why}
        out |= strangers({n: self.said[n] for n in names if n not in out})
        if len(names) - len(out) < needed:
            reasons = "; ".join(f"{n}: {why}" for n, why in out.items())
            raise RunFailed(f"{len(names) - len(out)} of {len(names)} sites take part, {needed} are needed ({reasons})")
        for name in out:
            del self.sites.table[name]
            self.said.pop(name, None)
        return out

    def without(self, out: Mapping[str, str], needed: int) -> Mapping[str, str]:
        """These sites take no part; RunError when fewer than `needed` do."""
        if len(self.said) - len(out) < needed:
            reasons = "; ".join(f"{n}: {why}" for n, why in out.items())
            raise RunFailed(f"{len(self.said) - len(out)} sites are left, {needed} are needed ({reasons})")
        for name in out:
            del self.sites.table[name], self.said[name]
        return out

    def close(self) -> dict[str, int]:
        """Tell every site which rounds counted last; returns how often each has loaded its model."""
        loads = {}
        for name, site in self.sites.table.items():
            head = {"op": "close", "protocol": PROTOCOL, "settled": list(site.settled), "dropped": list(site.dropped)}
            try:
                loads[name] = int(self.sites.link.call(name, head, b"", 10.0)[0].get("loads", 0))
            except Silence as why:
                log.warning("site '%s' did not hear that the run is over: %s", name, why)
        return loads

    def _try(self, site: str) -> str | None:
        try:
            self.one(site)
        except Silence as why:
            return plain(why)
        except Exception as error:  # of one site's answer: the others take part all the same
            log.warning("the opening of site '%s' cannot be read", site, exc_info=True)
            return f"its answer cannot be read ({type(error).__name__})"
        return None


def odd(head: Mapping[str, Any], sites: Sequence[str]) -> str | None:
    """Why what a site says of itself as it opens the run is nothing to go on with, or None."""
    for key, kind in (("boot", "name"), ("n", "count"), ("task", "name"), ("labels", "layout")):
        if key not in head or not KINDS[kind][1](head[key]):
            return f"'{key}' is {type(head.get(key)).__name__}, allowed is {KINDS[kind][0]}"
    if not isinstance(head["n"], int):
        return f"'n' is {head['n']}, allowed is a whole number of rows"
    if not isinstance(profile := head.get("profile"), Mapping):
        return f"'profile' is {type(profile).__name__}, allowed is a mapping"
    try:
        for key, value in profile.items():
            check_profile("profile", key, value)
    except RecipeError as error:
        return str(error)
    return None


def strangers(said: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Sites whose rows are of another task, or other labels, than those of most: who they are, and why."""
    kinds = {n: (str(s["task"]), tuple(map(str, s["labels"]))) for n, s in said.items()}
    counts = Counter(kinds.values()).most_common(2)
    if len(counts) < 2 or counts[0][1] == counts[1][1]:
        return {}  # nobody can say who is wrong: the run is refused where it is built
    (most, _), *_ = counts
    return {n: plain(f"its rows are of the task {task} with labels {list(labels)}, most sites' of {most[0]} with "
                     f"{list(most[1])}") for n, (task, labels) in kinds.items() if (task, labels) != most}


def for_sites(recipe: Recipe) -> dict[str, Any]:
    """The recipe without what is the coordinator's alone: where its own rows lie, its environments and their tools, its
    plugin files, its baselines, and the model that it keeps to itself when sites get another, and models that it alone
    asks."""
    raw = recipe.model_dump(mode="json")
    raw["data"] = {k: v for k, v in raw["data"].items() if k not in NOT_SENT}
    raw["model"] |= {"name": recipe.model.at_clients or recipe.model.name, "at_clients": None}
    method = make_method(recipe.method.name, **recipe.method.knobs)
    for name in set(method.server_asks_for()) - set(method.asks_for()):
        raw["models"].pop(name, None)
    for model in raw["models"].values():
        (model["endpoint"] or {}).pop("api_key_env", None)
    raw["method"] = {k: v for k, v in raw["method"].items() if k != "api_key_env"}  # a site names its own
    raw["engine"]["kind"] = "in_process"
    raw["evaluate"]["baselines"], raw["plugins"], raw["track"] = [], [], []
    return raw
