"""Whole, unmodified trainings of hosts with a policy, on the CPU; `tools/host_training.py` runs them."""
