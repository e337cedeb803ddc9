"""What packed data looks like: order of words, streams of outliers, tables of quantizers."""
