"""A decision transformer: what is still to be earned, what is seen and what was done so far -> what is done next."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedllm.core.rng import torch_stream
from fedllm.models.load import DTYPES, place_of
from fedllm.models.model import Model
from fedllm.models.series import Block, start
from fedllm.spaces.space import Space

DECIDER = "decider"
"""The model's name in a recipe."""


class DeciderNet(nn.Module):
    """A token a step: its return to go and time, what was seen, and the action BEFORE it, which is what the authors'
    three tokens a step have told by then; time is a number, so that no table of timesteps ends.

    In front stand a prompt's: the cues of a place, and steps of what went well there, with the action that was taken.
    """

    def __init__(self, size: int, actions: int, cues: int, width: int, depth: int, heads: int,
                 rng: torch.Generator) -> None:
        super().__init__()
        self.actions = actions
        self.value, self.place = nn.Linear(2, width), nn.Linear(size, width)
        self.before, self.shown = nn.Embedding(actions + 1, width), nn.Embedding(actions, width)
        self.cue = nn.Linear(cues, width) if cues else None
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.leave = nn.LayerNorm(width), nn.Linear(width, actions)
        start(self, rng)

    def decide(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Logits of each step's action [N, L, actions].

        `togo` [N, L, 2], `seen` [N, L, size] and `did` [N, L] are the steps, of which the action of the last is not
        read; `cues` [N, C or 0] and `shown_*` [N, P, ...] (P may be 0) are the prompt.
        """
        dtype, did = self.leave.weight.dtype, parts["did"].clamp(min=0)
        first = torch.full_like(did[:, :1], self.actions)  # nothing was done before
        steps = (self.value(parts["togo"].to(dtype)) + self.place(parts["seen"].to(dtype))
                 + self.before(torch.cat([first, did[:, :-1]], 1)))
        front = []
        if self.cue is not None and parts["cues"].shape[1]:
            front.append(self.cue(parts["cues"].to(dtype))[:, None])
        if parts["shown_did"].shape[1]:
            front.append(self.value(parts["shown_togo"].to(dtype)) + self.place(parts["shown_seen"].to(dtype))
                         + self.shown(parts["shown_did"]))
        x = torch.cat([*front, steps], 1)
        t = x.shape[1]
        mask = torch.ones(t, t, dtype=torch.bool, device=x.device).tril()[None, None]
        for block in self.blocks:
            x = block(x, mask)
        return self.leave(self.norm(x[:, t - did.shape[1] :]))


def make_decider(size: int, actions: int, cues: int, width: int, depth: int, space: Space, *, seed: int = 0,
                 dtype: str = "float32", device: str = "cpu") -> Model:
    """The network with `space` installed, its weights drawn by the seed; a head of its attention is 8 wide."""
    net = DeciderNet(size, actions, cues, width, depth, width // 8, torch_stream(seed, DECIDER))
    return Model(net.to(DTYPES[dtype]).to(place_of(device)), None, "environment", space, seed=seed,
                 fast_kernels=False, name=DECIDER)
