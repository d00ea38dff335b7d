"""AdamW2, the optimizer that needs no warmup, in any loop."""
