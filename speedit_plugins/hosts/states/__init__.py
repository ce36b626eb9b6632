"""The state of policies, for a host's checkpoint or a file."""
