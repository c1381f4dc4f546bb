"""One run, from its recipe to its result: building, driving, checkpointing, judging, sealing, replaying."""
