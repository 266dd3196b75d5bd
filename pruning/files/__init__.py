"""Pruned networks in and out of disk."""
