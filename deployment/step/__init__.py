"""One step of a model over a packed cache: attend, store; compiled, captured, checked."""
