"""Sweeps over method × budget × seed, and the reports made of them."""
