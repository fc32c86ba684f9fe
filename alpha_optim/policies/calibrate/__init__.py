"""The search for the learning rate, and what is held afterwards."""
