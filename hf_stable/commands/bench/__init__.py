"""`hf-stable bench`: costs as ratios to baselines in the same run, or worked out."""
