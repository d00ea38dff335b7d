"""The micro-batches before an alarm: kept, measured sample by sample, written down, skipped."""
