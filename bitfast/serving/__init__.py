"""``bitfast serve``: a model behind HTTP, on Ray Serve."""
