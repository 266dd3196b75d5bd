"""Data: manifests and layouts (the images), plans (order and processing), loaders (execution)."""

from image_classification.extras import need

need("PIL", "torchvision", "rich")
