"""Decode attention in CUDA C++."""
