"""How a network is computed: its modules are read once, and a plan is made for each setting, then executed."""
