"""Data: manifests and layouts (what there is), plans (what is read when and how), loaders (who reads it)."""
