"""Oracles. They share no code with the package and must not import it (a test enforces this)."""
