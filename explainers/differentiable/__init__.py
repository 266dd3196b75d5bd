"""Explanations with gradients: features, gates, matching losses, what the original network explained."""
