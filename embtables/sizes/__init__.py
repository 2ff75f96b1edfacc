"""What tables are made of and how many bytes that takes: layouts, shares of a budget, bytes that are counted."""
