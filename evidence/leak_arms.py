"""The arms of the leak test (`evidence/text_leaks.py`): each method that a text may leave by, and what leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Arm:
    """A method as it is run here."""

    method: str
    knobs: Mapping[str, Any] = field(default_factory=dict)
    task: str = "generation"
    rounds: int = 1
    asks: bool = False
    """Whether it also answers a question about each canary."""
    layers: Sequence[tuple[str, Mapping[str, Any]]] = ()
    models: Sequence[str] = ()
    says: str = ""
    """How it is run, in words."""


WRITES = {"max_new_tokens": 24}
FDKT = {"texts": 8, "more": 1, "generator_steps": 200, "least_new": 0.0, "embed": "tfidf", "seed": 0,
        "temperature": 0.7, "max_new_tokens": 48}
ARMS: Mapping[str, Arm] = {
    "fed_rag": Arm("fed_rag", asks=True, says="snippets of the rows found for a question"),
    "fed_rag_picked": Arm("fed_rag", {"text": "picked"}, asks=True, says="the best row alone"),
    "fed_sp_sc": Arm("fed_sp_sc", {"embed": "tfidf", **WRITES}, says="the rows' questions"),
    "fed_sp_sc_hashes": Arm("fed_sp_sc", {"embed": "tfidf", "pool": "hash_match", **WRITES},
                            says="hashes, and a question where one is wanted"),
    "cot_prompting": Arm("cot_prompting", {"offered": 16, "validation": 0, **WRITES}, says="rows offered as examples"),
    "fedcot": Arm("fedcot", {"epsilon": None, "repair": "none", **WRITES}, models=("teacher",),
                  says="questions as they are"),
    "fedcot_noisy": Arm("fedcot", {"epsilon": 6.0, "repair": "none", "seed": 0, **WRITES}, models=("teacher",),
                        says="questions, each word exchanged at epsilon 6"),
    "inferdpt": Arm("inferdpt", {"protect": "none", **WRITES}, says="documents as they are"),
    "inferdpt_dp_text": Arm("inferdpt", WRITES, layers=(("dp_text", {"token_epsilon": 1.0, "epsilon": 1000.0}),),
                            says="documents, each token drawn at epsilon 1"),
    "crosslm": Arm("crosslm", {"texts": 8, "least_new": 0.0, "write_steps": 1, **WRITES}, task="classification",
                   models=("writer",), says="grades alone leave; texts come down"),
    "llm_synth_classify": Arm("llm_synth_classify", {"generator": "writer", "n_per_label": 6, "embed": "tfidf",
                                                     "collapse": 1.0, "agree": False, **WRITES},
                              task="classification", models=("writer",), says="nothing leaves; texts come down"),
    "sycophancy_synth": Arm("sycophancy_synth", {"n": 8, "filtration": False}, says="nothing leaves; claims about "
                                                                                    "public rows come down"),
    "llm_synth_pretrain": Arm("llm_synth_pretrain", {"n_synth": 8, "warm_steps": 1, "public": 1.0, "filtered": 0.0,
                                                     "generated": 0.0, "transformed": 0.0},
                              says="the server learns public text; weights cross"),
    "self_instruct_local": Arm("self_instruct_local", {"target": 0.5, "max_attempts": 1, **WRITES},
                               says="texts that are written at home stay there"),
    "fedpit": Arm("fedpit", {"synthetic_ratio": 0.0, "beta": 0.5}, says="weights cross"),
    "public_dp_distill": Arm("public_dp_distill", {"public_steps": 1, "match_rounds": 1}, rounds=2,
                             says="weights cross"),
    "fed_synth_upload": Arm("fed_synth_upload", {"n_syn": 4, "length": 8, "outer_steps": 3, "inner_steps": 2},
                            task="classification", says="embeddings, read here as their nearest tokens"),
    "synth_warmstart": Arm("synth_warmstart", {"n_syn": 6, "generator_steps": 200, "warm_steps": 1, "temperature": 0.5,
                                               "license": "CC0-1.0", "max_new_tokens": 96},
                           says="rows of a generator that was overfitted at home"),
    "fdkt": Arm("fdkt", {**FDKT, "target_epsilon": None}, task="classification", rounds=2,
                models=("generator", "writer"), says="texts of an overfitted generator, without privacy"),
    "fdkt_private": Arm("fdkt", {**FDKT, "target_epsilon": 8.0}, task="classification", rounds=2,
                        models=("generator", "writer"), says="the same, trained at epsilon 8"),
}
APART = {
    "fical": "acts in environments and holds no rows", "fot": "acts in environments and holds no rows",
    "federated_skill": "acts in environments and holds no rows", "fedyolo": "names of tasks alone",
    "multilingual_fpt": "names of languages alone",
    "skill_cmib": "its rows are skills with traces; a card holds words that several traces of a client share",
}
"""Methods whose cards say that text leaves, and why they stand in no arm."""
