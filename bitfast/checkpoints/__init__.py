"""Checkpoints: finding files, reading and writing weights, ``from_pretrained`` and its relatives."""
