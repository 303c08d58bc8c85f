"""The image processors and their parts."""
