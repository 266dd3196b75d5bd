"""What a rewrite starts from, what goes along with it, and what it did."""
