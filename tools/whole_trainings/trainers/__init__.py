"""Trainings by trainers that run on a CPU by themselves."""
