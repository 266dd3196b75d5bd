"""What is given back after a cut: layers that read removed channels reproduce their outputs from those that stay."""
