"""Checkpoint files: reading them, packing them, and the layout of the reference repository."""
