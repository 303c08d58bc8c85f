"""What the commands of ``bitfast`` do; their arguments are in ``bitfast.cli``."""
