"""One pass over a weight: what AdamW2's step and sigma's refresh compute, as fast as memory is."""
