"""Diffusers pipelines as a search sees them, one evaluation at a time."""
