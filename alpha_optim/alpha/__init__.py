"""The number: four noisy observations of one step, a parabola, alpha; imports no torch."""
