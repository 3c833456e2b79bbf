"""Export a model to other runtimes (ONNX, torch.export) and publish it on the hub with a model card."""
