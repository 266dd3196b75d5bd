"""What a run shows and records: console, report, TensorBoard, resources, provenance."""
