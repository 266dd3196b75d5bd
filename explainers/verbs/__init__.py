"""Commands on finished networks: attribute, localize, compare."""

from image_classification.extras import need

need("rich", "matplotlib", "scipy", "torchmetrics")
