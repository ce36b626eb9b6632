"""What `make docs` writes besides the pages in docs/: each module makes one kind of page from the source."""
