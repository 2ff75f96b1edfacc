"""Words that users write, and those that they may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def did_you_mean(word: object, known: Sequence[str]) -> str:
    """``" (did you mean 'multi_hash'?)"`` for a word close to a known one, as ``multi-hash`` is; else nothing."""
    if not isinstance(word, str):
        return ""
    plain = {name.lower().replace("-", "_"): name for name in known}
    close = difflib.get_close_matches(word.strip().lower().replace("-", "_").replace(" ", "_"), plain, n=1)
    return f" (did you mean {plain[close[0]]!r}?)" if close else ""


def few(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def number_of(number: int, noun: str) -> str:
    """``"1 cell"``, ``"2 cells"``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def has_patterns(names: Iterable[object]) -> bool:
    """Whether some of these are no names but patterns, such as ``user_*``, of which the first that fits counts."""
    return not all(str(name).isidentifier() for name in names)
