"""`hf-stable run`: a training script as it is, with hf_stable attached."""
