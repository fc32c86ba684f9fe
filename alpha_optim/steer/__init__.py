"""The order of events around a step, and steps that are taken back."""
