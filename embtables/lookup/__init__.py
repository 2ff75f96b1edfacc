"""From ids to vectors, once: natively where recipes allow it and in PyTorch for the rest, block by block."""
