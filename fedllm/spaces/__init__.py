"""What is trained: each space names its trainables, starts them, and runs them for K clients in one forward."""

from fedllm.spaces.registry import SPACES, make_space

__all__ = ["SPACES", "make_space"]
