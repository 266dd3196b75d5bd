"""Shrinking of networks that were masked by other tools."""
