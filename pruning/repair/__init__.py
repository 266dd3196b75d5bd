"""What is given back after a cut: layers that read removed channels learn to say the same with those that stay."""
