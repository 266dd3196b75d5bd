"""Making up for a cut: layers that read removed channels reproduce their outputs from the rest."""
