"""The report of a run: a self-contained HTML file, and the same figures as JSON.

    python -m pruning report runs/demo

Figures are collected from the run's files (`lineage`, `trajectory`), measured if the files lack them (`networks`,
`measure`, `speed`), plotted (`charts`) and rendered (`page`).
"""

from image_classification.extras import need

need("PIL", "yaml", "matplotlib", "jinja2")
