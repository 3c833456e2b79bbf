"""A model for others: ONNX graphs for other runtimes, and the hub with its model cards."""
