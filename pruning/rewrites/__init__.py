"""Rewrites: their starting point, the optimizers and averages cut along with the network, and their records."""
