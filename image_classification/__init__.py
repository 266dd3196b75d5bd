"""Data, models and the training loop of LucidPrune. It depends on neither explainers nor pruning."""
