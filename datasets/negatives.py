"""Items that a user did not click, drawn for each click."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

ROUNDS = 100  # cheap: each round draws only for the clicks that are still without
ABSENT = -1


@dataclass(frozen=True)
class Negatives:
    """How negatives are drawn.

    With ``sampling`` "popularity" a negative is the item of a random click among the clicks of the preceding
    ``window_ms`` milliseconds (``None``: among all clicks), so that items are drawn in proportion to their clicks.
    With "uniform" all items are drawn with equal probability, and the window has no effect.
    """

    per_click: int = 1
    sampling: Literal["popularity", "uniform"] = "popularity"
    window_ms: int | None = 3_600_000

    def __post_init__(self) -> None:
        if self.per_click < 0:
            raise ValueError(f"negatives {self.per_click}: it cannot be negative")
        if self.sampling not in ("popularity", "uniform"):
            raise ValueError(f"negative_sampling '{self.sampling}': 'popularity' or 'uniform' is needed")
        if self.window_ms is not None and self.window_ms <= 0:
            raise ValueError("negative_window must be longer than 0")


def draw_negatives(
    users: np.ndarray, items: np.ndarray, times: np.ndarray, rule: Negatives, seed: int
) -> tuple[np.ndarray, dict[str, int]]:
    """Draws negatives. Returns items, int64 [clicks, per_click], ABSENT where none was found, and counts of exceptions.

    ``users`` and ``items`` are numbered from 0 without gaps, ``times`` ascends. A negative is never an item that the
    user clicked at any time, and a click's negatives differ. A click whose window offers none (the first clicks of the
    log, say) draws from all clicks.
    """
    num_clicks, num_items = len(items), int(items.max()) + 1
    clicked = np.unique(users * num_items + items)
    if rule.sampling == "uniform":
        pool = np.arange(num_items)
        low, high = np.zeros(num_clicks, np.int64), np.full(num_clicks, num_items)
    elif rule.window_ms is None:
        pool = items
        low, high = np.zeros(num_clicks, np.int64), np.full(num_clicks, num_clicks)
    else:
        pool = items
        low = np.searchsorted(times, times - rule.window_ms, side="left")
        high = np.searchsorted(times, times, side="left")
    generator = np.random.default_rng([seed, 2])
    negatives = np.full((num_clicks, rule.per_click), ABSENT, np.int64)
    beyond_window = 0
    for slot in range(rule.per_click):
        open_ = _fill_slot(
            negatives, slot, np.arange(num_clicks), users, pool, low, high, clicked, num_items, generator
        )
        whole = np.zeros(num_clicks, np.int64), np.full(num_clicks, len(pool))
        still = _fill_slot(negatives, slot, open_, users, pool, *whole, clicked, num_items, generator)
        beyond_window += len(open_) - len(still)
    absent = int((negatives == ABSENT).sum())
    return negatives, {"negatives_beyond_window": beyond_window, "negatives_absent": absent}


def _fill_slot(
    negatives: np.ndarray,
    slot: int,
    clicks: np.ndarray,
    users: np.ndarray,
    pool: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    clicked: np.ndarray,
    num_items: int,
    generator: np.random.Generator,
) -> np.ndarray:
    """Draws for the given clicks until a draw is allowed; gives back those that found none."""
    impossible = clicks[low[clicks] >= high[clicks]]
    clicks = clicks[low[clicks] < high[clicks]]
    for _ in range(ROUNDS):
        if len(clicks) == 0:
            break
        span = high[clicks] - low[clicks]
        drawn = pool[low[clicks] + np.minimum((generator.random(len(clicks)) * span).astype(np.int64), span - 1)]
        pairs = users[clicks] * num_items + drawn
        place = np.minimum(np.searchsorted(clicked, pairs), len(clicked) - 1)
        refused = (clicked[place] == pairs) | (negatives[clicks, :slot] == drawn[:, None]).any(1)
        negatives[clicks[~refused], slot] = drawn[~refused]
        clicks = clicks[refused]
    return np.concatenate([impossible, clicks])
