"""Figures of heat-maps: localisation, perturbation, movement."""

from image_classification.extras import need

need("torchvision", "rich", "sklearn")
