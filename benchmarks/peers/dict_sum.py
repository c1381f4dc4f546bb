"""FedAvg as OpenFedLLM and Shepherd write it: one `sum` of scaled copies for each key.

Source: github.com/rui-ye/OpenFedLLM, federated_learning/fed_global.py, `global_aggregate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor


def dict_sum(updates: Sequence[Mapping[str, Tensor]], sizes: Sequence[float]) -> dict[str, Tensor]:
    """The weighted mean of all updates, every one of them in memory."""
    total = sum(sizes)
    return {key: sum([u[key] * n / total for u, n in zip(updates, sizes, strict=True)]) for key in updates[0]}
