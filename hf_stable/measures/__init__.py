"""Numbers about tensors and losses: pure torch, no model, no Trainer."""
