"""Trainings by the hosts' train.py, of images, videos and points."""
