"""What embtables costs against others, measured side by side: ``python -m benchmarks.bench``."""
