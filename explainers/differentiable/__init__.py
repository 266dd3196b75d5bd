"""Differentiable explanations: feature taps, gates, matching losses, and explanations of the original network."""
