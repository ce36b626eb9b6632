"""What every seam does with a draw: random numbers, recomputed calls, draws that wait for a loss, weights."""
