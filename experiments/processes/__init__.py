"""Several processes that share a run: how they start, end each other, and agree."""
