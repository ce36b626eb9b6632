"""Hosts' code that is changed as a syntax tree before it runs."""
