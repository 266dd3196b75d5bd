"""Shrinking networks that were masked elsewhere."""
