"""Coupled channel groups and their removal: trace, labels, groups, proof, rewrite. Knows no data, loss or flag."""
