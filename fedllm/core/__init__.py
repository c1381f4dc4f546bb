"""The grammar: programs ask, engines answer, reducers fold, layers wrap. No training code and no I/O lives here."""
