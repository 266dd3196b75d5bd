"""The report of a run: one HTML file with everything inside, and the same figures as JSON.

    python -m pruning report runs/demo

Collected from what the run left (`lineage`, `trajectory`), measured where that is silent (`networks`, `measure`,
`speed`), drawn (`charts`) and laid out (`page`).
"""

from image_classification.extras import need

need("PIL", "yaml", "matplotlib", "jinja2")
