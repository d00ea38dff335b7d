"""`hf-stable doctor`: what a report of a bug needs."""
