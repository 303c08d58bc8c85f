"""The image processors, and what they are made of."""
