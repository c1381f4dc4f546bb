"""What is trained: each space names its trainables, starts them, and runs them for K clients in one forward."""

from fedllm.spaces.registry import make_space, space_classes

__all__ = ["make_space", "space_classes"]
