"""Seam F, and other trainers whose draw and loss are in functions of their own; one file for each way."""
