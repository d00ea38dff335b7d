"""`hf-stable demo`: the main job on embedded data."""
