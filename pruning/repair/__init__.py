"""Repair after a cut: layers that read removed channels are refitted to reproduce their outputs from the remaining
ones.
"""
