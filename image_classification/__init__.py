"""Data, models and the training loop of LucidPrune. Knows neither explainers nor pruning."""
