"""The page of a sweep, report.html."""
