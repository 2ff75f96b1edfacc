"""What ``compress_`` is made of: finding tables, parting the plan, and moving whatever holds the old ones."""
