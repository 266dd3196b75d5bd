"""A rewrite's starting point, what is cut along with the network (optimizers, averages), and the record."""
