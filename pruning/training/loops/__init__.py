"""Callbacks that prune in the training loops of other libraries. Each file needs its library; nothing else does."""
