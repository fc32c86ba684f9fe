"""Slopes of single samples along a step, one file per way of getting them."""
