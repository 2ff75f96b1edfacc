"""The readers of public data sets and common formats, one file each."""
