"""What an adapter's upload leaks: which tokens pass the span test of its factors, module by module, and why no more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedllm.audits._span import BLOCK, spans
from fedllm.audits._span import passing as far_of
from fedllm.core.card import Card, Claim
from fedllm.core.knobs import Knobs, knob
from fedllm.core.payload import Tree
from fedllm.models.model import Model


@dataclass(frozen=True)
class Channel:
    """One factor of one module of the first block."""

    module: str
    factor: str
    rank: int
    seen: int
    """Directions that were seen."""
    tokens: list[int]
    """Tokens of the vocabulary that pass; none where every one would."""
    verdict: str
    """leaks; full (as many inputs as the rank, or noise: every token passes); closed (none passes: more inputs than the
    rank were mixed into its rows)."""


@dataclass(frozen=True)
class LoraLeak(Knobs):
    """The rank rule: an A factor's change is s B^T G^T X and shows the T inputs while T <= r (it needs a B that is not
    zero); a B factor's is s G^T X A^T and shows A x while T < r, in the first round too. A query's factors see one
    input less, since at the first place it looks at itself alone; what of a row its last token is no weight sees.
    """

    card: ClassVar[Card] = Card(
        title="What a LoRA upload leaks: the rank rule",
        paper="after Chen et al. (UTR), WWW 2026, arXiv 2601.17533, and DAGER, arXiv 2405.15586; the rule is ours",
        topic="attacks",
        sends="nothing: it reads the change of the A and B factors of the first block",
        needs="one step of SGD, the factors that the client was told; of UTR's frozen layers no upload shows anything",
        claim=Claim("of a B factor of rank 8 exactly the tokens of 7 different inputs pass: errors", rig="rank_rule",
                    metric="errors", holds="<=", threshold=0.0, kind="exact", options={"inputs": 7}),
        only_exact="the rule counts tokens; how well whole texts are read is measured by att_dager",
        evidence="UTR itself (its abstract and a note) was read alone; its ratio of weight to bias gradients belongs "
                 "to bottleneck adapters with a bias.",
        also={
            "full": Claim("of 8 inputs every token passes, so that it tells nothing: share told", rig="rank_rule",
                          metric="told", holds="<=", threshold=0.0, kind="exact", options={"inputs": 8}),
            "a": Claim("of an A factor of rank 8 (B not zero) exactly the tokens of 8 inputs pass: errors",
                       rig="rank_rule", metric="errors", holds="<=", threshold=0.0, kind="exact",
                       options={"inputs": 8, "factor": "A"}),
            "a_closed": Claim("of 9 inputs no token passes: share told", rig="rank_rule", metric="told", holds="<=",
                              threshold=0.0, kind="exact", options={"inputs": 9, "factor": "A"})})

    tau: float = knob(1e-3, "distance below which a token was there", gt=0, lt=1)
    factors: tuple[str, ...] = knob(("A", "B"), "the factors that are read: ffa_lora sends B alone, fedsa_lora A alone")

    def read(self, model: Model, told: Tree, moved: Tree, base: Tree | None = None,
             vocabulary: Sequence[int] | None = None) -> list[Channel]:
        """Each factor of the first block that moved, and what of the vocabulary passes its test."""
        words = list(vocabulary if vocabulary is not None else range(model.net.config.vocab_size))
        out = []
        for name in sorted(moved):
            path, _, factor = name.removesuffix(".weight").partition(".lora_")
            block = BLOCK.search(path)
            if factor not in self.factors or block is None or int(block[1]):
                continue
            for span in spans(model, {name: moved[name]}, told, 0):  # told holds the A that a B is seen through
                rank = int(moved[name].shape[0 if factor == "A" else 1])
                if span.full:
                    out.append(Channel(span.path, factor, rank, span.rank, [], "full"))
                    continue
                far = far_of([span], model, told, base, [[w] for w in words], self.tau, len(words)).tolist()
                tokens = [w for w, d in zip(words, far, strict=True) if d < 1]
                out.append(Channel(span.path, factor, rank, span.rank, tokens, "leaks" if tokens else "closed"))
        return out
