"""Small experiments on which claims are measured: a module's `RIGS[name](subject, seed, **options)` gives metrics."""
