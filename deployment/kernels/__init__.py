"""The inner loops of attention over a packed cache.

Every op is a torch function that any device runs; its Triton twin goes into the same file and is picked by
`deployment/attention.py` where it can run.
"""
