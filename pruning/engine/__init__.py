"""What is cut together, and the cut: trace, labels, groups, proof, rewrite. Knows no data, loss or flag."""
