"""One room for each `hf-stable` command."""
