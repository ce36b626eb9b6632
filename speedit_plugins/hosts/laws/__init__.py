"""Timestep laws of other trainers, by the names and flags that those trainers give them."""
