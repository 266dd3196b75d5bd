"""Saving and loading pruned networks."""
