"""Compressed tables inside a model that exists.

``swap`` has ``compress_``; the other modules find the tables (``discovery``) and who else holds them (``references``),
tell optimizers of the new ones (``optimizers``), cut the plan into modules (``partition``) and describe what was done
(``report``).
"""
