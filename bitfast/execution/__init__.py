"""How a network runs: read once, decided once for each setting, then run."""
