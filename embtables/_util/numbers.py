"""Numbers as users have them: Python's, NumPy's, and integer tensors of one element."""

from __future__ import annotations

import operator
from numbers import Real
from typing import Any

import numpy as np


def as_int(value: Any) -> int | None:
    """The integer as Python's own; ``None`` for all that is none, truth values included."""
    if isinstance(value, (bool, np.bool_)):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def as_float(value: Any) -> float | None:
    """The real number as a float of Python's own, finite or not; ``None`` for all that is none."""
    integer = as_int(value)
    if integer is not None:
        return float(integer)
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else None


def is_non_negative(value: Any) -> bool:
    """Whether it is a finite real number of at least 0."""
    number = as_float(value)
    return number is not None and 0 <= number < float("inf")
