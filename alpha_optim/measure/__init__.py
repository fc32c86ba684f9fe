"""One step: what was seen at its two ends, and when it is measured."""
