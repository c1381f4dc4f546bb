"""What the clients of an ask were told, as their replies are held to it."""

import torch

from fedllm.core.form import Form


def test_one_tensor_under_two_names_is_told_under_both():
    """FedCola hands the text's blocks out under the names of the picture's, and the text's clients their own."""
    w = torch.zeros(2, 3)
    form = Form.of("theta: tree").bound({"a": {"theta/x": torch.ones(1), "aux/y": w}, "b": {"theta/y": w, "aux/z": w}})
    assert form.told is not None and form.told.shapes == {"x": {(1,)}, "y": {(2, 3)}, "z": {(2, 3)}}
    form.check({"theta/y": torch.ones(2, 3)})
