"""What a sample is worth beside the others of its group, for policy gradients without a critic."""

from __future__ import annotations

import numpy as np


def advantages(rewards: np.ndarray, scale: bool = True, eps: float = 1e-4) -> np.ndarray:
    """A_j = (r_j - mean r) / (std r + eps) of each group [groups, samples]; without `scale` r_j - mean r alone.

    Exactly 0 where a group's rewards are all equal, whatever rounding makes of their mean.
    """
    off = rewards - rewards.mean(1, keepdims=True)
    off = np.where(np.ptp(rewards, axis=1, keepdims=True) == 0, 0.0, off)
    return off / (rewards.std(1, keepdims=True) + eps) if scale else off
