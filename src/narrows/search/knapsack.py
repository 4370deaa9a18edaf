"""One choice for each of many parts, the cheapest in all that keeps several limits: found, and bounded from below."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

ROUNDS = 80  # steps of the dual ascent; the bound holds after any number of them
WORSE = 1e-9  # relative tolerance of a limit, for sums of floats


@dataclass(frozen=True)
class Choice:
    """The option of each part, and a proven lower bound of what any choice within the limits costs.

    chosen  [parts] indices of options, None where nothing within the limits was found; bound  inf where none exists
    """

    chosen: Any
    cost: float
    bound: float


def solve(costs: Mapping[str, Any], limits: Mapping[str, float], minimise: str) -> Choice:
    """Choose one option of each part so that the sum of `costs[minimise]` is least and every other sum is within its limit.

    costs: by quantity [parts, options]; an option that a part lacks is infinite in all. limits: by quantity, of the sum
    over all parts. By Lagrangian relaxation: prices on the limits make the parts independent, which gives a bound; the
    choices on the way there are repaired to keep the limits and then improved one part at a time.
    """
    names = [name for name in limits if name != minimise]
    cost = np.asarray(costs[minimise], dtype=np.float64)
    parts = np.arange(len(cost))
    least = [np.min(costs[name], axis=1) for name in names]
    slack = np.array([limits[name] - base.sum() for name, base in zip(names, least, strict=True)])
    if names and (slack < -WORSE * np.abs([limits[name] for name in names])).any():
        return Choice(None, np.inf, np.inf)
    # above each part's least, in units of what is left for all parts together: every limit is 1
    room = [max(s, 1e-7 * abs(limits[name]), 1e-300) for name, s in zip(names, slack, strict=True)]
    weights = np.zeros((len(names), *cost.shape))
    for weight, name, base, most in zip(weights, names, least, room, strict=True):
        weight[:] = np.where(np.isfinite(cost), (costs[name] - base[:, None]) / most, 1e30)
    dearest = float(np.where(np.isfinite(cost), cost, -np.inf).max(axis=1).sum())
    prices = np.zeros(len(names))
    best, best_cost, bound, pace = None, np.inf, -np.inf, 1.0
    for _ in range(ROUNDS):
        priced = cost + np.tensordot(prices, weights, 1)
        chosen = priced.argmin(axis=1)
        over = weights[:, parts, chosen].sum(axis=1) - 1
        lower = float(priced[parts, chosen].sum() - prices.sum())
        pace = pace if lower > bound else pace * 0.9
        bound = max(bound, lower)
        kept = _improved(cost, weights, _repaired(cost, weights, chosen))
        if kept is not None and cost[parts, kept].sum() < best_cost:
            best, best_cost = kept, float(cost[parts, kept].sum())
        step = over * (over > 0) if not prices.any() else np.where((prices > 0) | (over > 0), over, 0.0)
        if not step.any() or (best is not None and best_cost - bound <= WORSE * abs(best_cost)):
            break
        target = best_cost if np.isfinite(best_cost) else dearest + abs(dearest) + 1
        prices = np.maximum(prices + pace * (target - lower) / float(step @ step) * step, 0.0)
    if best is None and bound > dearest:  # no choice can cost this much: there is none
        bound = np.inf
    return Choice(best, best_cost, min(bound, best_cost))


def _repaired(cost: Any, weights: Any, chosen: Any) -> Any:
    """A choice within the limits from one beyond them, by the changes that cost least for what they bring; or None."""
    chosen, parts = chosen.copy(), np.arange(len(cost))
    total = weights[:, parts, chosen].sum(axis=1)
    for _ in range(cost.size):
        if (total <= 1 + WORSE).all():
            return chosen
        after = total[:, None, None] + weights - weights[:, parts, chosen][:, :, None]
        gain = np.maximum(total - 1, 0).sum() - np.maximum(after - 1, 0).sum(axis=0)
        dearer = cost - cost[parts, chosen][:, None]
        rate = np.where(gain > 1e-12, np.maximum(dearer, 0) / np.maximum(gain, 1e-12), np.inf)
        part, option = np.unravel_index(rate.argmin(), rate.shape)
        if not np.isfinite(rate[part, option]):
            return None
        total = after[:, part, option]
        chosen[part] = option
    return None


def _improved(cost: Any, weights: Any, chosen: Any) -> Any:
    """A choice within the limits made cheaper for as long as changing one part can do it."""
    if chosen is None:
        return None
    chosen, parts = chosen.copy(), np.arange(len(cost))
    total = weights[:, parts, chosen].sum(axis=1)
    for _ in range(cost.size):
        after = total[:, None, None] + weights - weights[:, parts, chosen][:, :, None]
        cheaper = np.where((after <= 1 + WORSE).all(axis=0), cost[parts, chosen][:, None] - cost, -np.inf)
        part, option = np.unravel_index(cheaper.argmax(), cheaper.shape)
        if cheaper[part, option] <= 0:
            break
        total = after[:, part, option]
        chosen[part] = option
    return chosen
