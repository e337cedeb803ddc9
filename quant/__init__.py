"""Stage 2: fit quantizers to records; measure a model whose keys and values are quantized in simulation."""
