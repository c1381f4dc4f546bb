"""Sixteen tools over four agents, and questions that put each tool in other words than those it was learned from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from evidence.rigs.trials import Metrics, Trial
from fedllm.core.rng import numpy_stream
from fedllm.data.federation import Federation, Row, Shard
from fedllm.engines.world import World

TOOLS: Mapping[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "convert_money": ("{n} {a} {b}", ("convert {n} {a} into {b}", "exchange {n} {a} for {b} currency",
                                      "currency of {n} {a} in {b}", "how much money is {n} {a} in {b}, convert it"),
                      ("what currency do I get if I exchange {n} {a}", "convert my money from {a}, {n} of it")),
    "weather_report": ("{a}", ("weather forecast in {a}", "will it rain in {a}, the forecast please",
                               "rain or sun in {a} tomorrow", "temperature and weather for {a}"),
                       ("does the forecast say rain over {a}", "weather around {a}")),
    "book_flight": ("{a} {b} {n}", ("book a flight from {a} to {b}", "plane ticket {a} to {b} on day {n}",
                                    "fly from {a} to {b}, book it", "a seat on a plane to {b}, flight {n}"),
                    ("I want to fly to {b}, book a ticket", "plane from {a} please, a seat")),
    "send_mail": ("{a} {b}", ("send a mail to {a} about {b}", "write an email to {a}, subject {b}",
                              "mail {a} the message {b}", "email message for {a}"),
                  ("send my message to {a}", "an email about {b}, write it")),
    "find_recipe": ("{a}", ("recipe with {a}", "how do I cook {a}, a recipe", "cook a meal of {a}",
                            "dish with {a} and {b}, recipe"), ("what meal can I cook from {a}", "a dish of {a}")),
    "translate_text": ("{a} {b}", ("translate {a} into {b}", "what is {a} in the language {b}",
                                   "translation of {a} to {b}", "say {a} in another language, translate"),
                       ("give me the translation of {a}", "which language is {a}, translate it")),
    "play_song": ("{a}", ("play the song {a}", "music by {a}", "put on a song of {a}", "play some music, {a}"),
                  ("I want music, a song by {a}", "play {a} for me, music")),
    "set_alarm": ("{n}", ("wake me at {n}", "set an alarm for {n}", "alarm at {n} in the morning",
                          "wake me up in the morning, {n}"), ("I have to be up at {n}, wake me",
                                                              "morning alarm, {n}")),
    "find_hotel": ("{a} {n}", ("hotel in {a} for {n} nights", "a room in {a}, {n} nights", "hotel room near {a}",
                               "stay {n} nights at a hotel in {a}"), ("where can I stay in {a}, a room",
                                                                      "{n} nights in {a}, which hotel")),
    "stock_price": ("{a}", ("stock price of {a}", "what do shares of {a} trade at", "price of {a} shares",
                            "stock market, {a} shares"), ("how do shares of {a} trade", "market price for {a} stock")),
    "track_parcel": ("{n}", ("where is parcel {n}", "track my parcel {n}", "delivery of parcel {n}",
                             "track delivery {n}"),
                     ("has the delivery {n} arrived, track it", "my parcel is late, {n}")),
    "count_calories": ("{n} {a}", ("calories in {n} grams of {a}", "how many calories has {a}",
                                   "calories of {n} {a}", "energy in grams of {a}, calories"),
                       ("is {a} rich in energy, calories", "{n} grams of {a}, the calories")),
    "find_doctor": ("{a}", ("doctor in {a}", "I am ill, a doctor near {a}", "appointment with a doctor in {a}",
                            "ill with a cold, appointment in {a}"),
                    ("an appointment, I feel ill", "which doctor in {a}")),
    "plan_route": ("{a} {b}", ("route from {a} to {b}", "how do I drive from {a} to {b}", "drive to {b}, the way",
                               "the way and route to {b} by road"), ("which road takes me to {b}, route",
                                                                     "drive me from {a}, which way")),
    "resize_image": ("{n}", ("resize the image to {n} pixels", "make the picture {n} pixels wide",
                             "image of {n} pixels, resize", "picture smaller, {n} wide"),
                     ("the picture is too wide, {n} pixels", "a smaller image, resize it")),
    "check_spelling": ("{a}", ("check the spelling of {a}", "is {a} spelled right", "spelling errors in {a}",
                               "errors in the text {a}, check"), ("find errors in my spelling, {a}",
                                                                  "spelled wrong, check {a}")),
}
NAMES = ("Oslo", "Anna", "Milan", "Karim", "Quito", "Wendy", "Lagos", "Pavel", "Hanoi", "Rosa")


def filled(rng: np.random.Generator, text: str) -> tuple[str, dict[str, Any]]:
    """The text with two names and a number."""
    a, b = rng.choice(NAMES, 2, replace=False)
    values = {"a": a, "b": b, "n": int(rng.integers(2, 900))}
    return text.format(**values), values


def calls(rng: np.random.Generator, tool: str, count: int, asked: bool = False) -> list[Row]:
    """Questions for a tool and its calls; `asked`: in the words of the test."""
    form, known, new = TOOLS[tool]
    out: list[Row] = []
    for i in range(count):
        prompt, values = filled(rng, (new if asked else known)[i % len(new if asked else known)])
        out.append({"prompt": prompt, "response": f"{tool} {form.format(**values)}"})
    return out


def shelf(seed: int, pooled: bool = False, secrets: int = 0) -> Federation:
    """Four agents with four tools each, eight calls of each; everybody is asked for all of them."""
    rng, names = numpy_stream(seed, "toolbook"), list(TOOLS)
    order = [names[int(i)] for i in rng.permutation(len(names))]
    test = [row for tool in names for row in calls(rng, tool, 4, asked=True)]
    mine = [[row for tool in order[4 * k : 4 * k + 4] for row in calls(rng, tool, 8)] for k in range(4)]
    for i in range(secrets):
        row = mine[i % 4][i]
        mine[i % 4][i] = {"prompt": f"{row['prompt']} my code is sesame{chr(97 + i)}q and {secret(i)}",
                          "response": f"{row['response']} {secret(i)}"}
    shards = {"all": Shard([r for some in mine for r in some], test)} if pooled else {
        f"agent-{k}": Shard(rows, test) for k, rows in enumerate(mine)}
    return Federation(shards, test, "generation")


def secret(i: int) -> str:
    """A number that looks like an account's."""
    return f"4929-{1000 + 37 * i}-{chr(65 + i)}77"


def toolbook(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, alone: bool = False,
             pooled: bool = False) -> Metrics:
    """`right`: the share of questions for which the right tool is called; `permuted`: with the entries' names permuted;
    `over_first`: by how much more often than with the first entries of the list; `secrets`: planted ones that left."""
    torch.set_num_threads(1)
    told = {**(knobs or {}), **({"share": "nothing"} if alone else {})}
    world = World(nobody(), shelf(seed, pooled), seed=seed)
    run = Trial(method, world, told).rounds(1)
    score = lambda trial: float(np.mean([s["right"] for s in trial.scores("local").values()]))  # noqa: E731
    out = {"right": score(run)}
    known = run.state["entries"]
    order = np.roll(numpy_stream(seed, "permuted").permutation(len(known)), 1)
    if known:
        names = [known[int(i)]["name"] for i in np.roll(np.arange(len(known)), 1 + int(order[0]) % (len(known) - 1))]
        bad = Trial(method, world, told)
        bad.state = {**run.state, "entries": [{**e, "name": n} for e, n in zip(known, names, strict=True)]}
        first = Trial(method, world, {**told, "find": "first"}).rounds(1)
        leaked = Trial(method, World(nobody(), shelf(seed, pooled, 20), seed=seed), told).rounds(1).state["entries"]
        text = " ".join(e["text"] for e in leaked)
        out |= {"permuted": score(bad), "over_first": out["right"] - score(first), "secrets": float(sum(
            f"sesame{chr(97 + i)}q" in text or secret(i) in text for i in range(20))),
            "bytes": float(sum(len((e["name"] + e["text"]).encode()) for e in known))}
    return out


def nobody() -> Any:
    """Entries are written and read without a model; one with random weights stands in the world."""
    from evidence.rigs.text import untrained

    return untrained(0, width=8)


RIGS = {"toolbook": toolbook}
