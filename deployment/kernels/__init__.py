"""The inner loops of attention over a packed cache: in CUDA C++ (decode/) and Triton, and the torch definition (attend.py)."""
