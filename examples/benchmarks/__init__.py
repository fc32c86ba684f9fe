"""Examples that measure."""
