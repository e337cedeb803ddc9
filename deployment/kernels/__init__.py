"""The inner loops of attention over a packed cache: in CUDA C++ (decode/) and Triton, and held against the torch definition (step/reference.py)."""
