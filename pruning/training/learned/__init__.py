"""Saliency-matching pruning with learned gates (ISP): gates are trained, converted to widths, and the network is
rewritten.
"""
