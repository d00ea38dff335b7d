"""Removing LayerNorms, and the stand-alone form in which such models are saved."""
