"""Seam B: objects of a host that draw or get t in a training method."""
