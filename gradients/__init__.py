"""Stage 1: run a calibration text through a model; record pre-RoPE keys, values and their Fisher information."""
