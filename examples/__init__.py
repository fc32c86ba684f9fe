"""Examples; run them as modules: ``python -m examples.demo``."""
