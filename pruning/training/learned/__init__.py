"""Saliency-matching pruning with learned gates (ISP): gates learn, become widths, the network is rewritten."""
