"""Save the state of a run, and continue from it."""
