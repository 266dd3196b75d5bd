"""Output and records of a run: console, report, TensorBoard, resources, provenance."""
