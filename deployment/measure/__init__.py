"""What benchmarks measure against and on: shapes, synthetic caches, fp16, clocks."""
