"""The only door to onnxruntime: graphs run over rows of state that stay where they are."""
