"""Every group is tried against the masked network before it is called prunable."""
