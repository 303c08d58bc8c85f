"""``bitfast embed``: the features of images as vectors, on one machine or on a Ray cluster."""
