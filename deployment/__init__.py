"""Stage 3: a really packed cache, attention over it, and generation on unmodified transformers."""
