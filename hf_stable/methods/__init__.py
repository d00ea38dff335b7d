"""Patching a model, folding it back, describing what was done."""
