"""A host's library with the functions of sd-scripts by name and signature; every line is our own."""
