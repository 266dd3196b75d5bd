"""Data: manifests and layouts (what there is), plans (what is read when and how), loaders (who reads it)."""

from image_classification.extras import need

need("PIL", "torchvision", "rich")
