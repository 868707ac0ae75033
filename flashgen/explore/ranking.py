"""How far a predicted order of candidates is from the measured one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def rank_correlation(predicted: Sequence[float], measured: Sequence[float]) -> float | None:
    """Spearman's rho: 1 where both order alike; equal values share their mean rank.

    None where there is no order to compare: fewer than two candidates, or all of them equal on one side.
    """
    a, b = _ranks(predicted), _ranks(measured)
    if a.size < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def regret(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """What trusting the prediction loses: 1 - measured rate of the predicted best / measured best rate.

    Both are rates, higher is better. Of candidates predicted equal, the first counts: lists begin with what
    the solver chooses.
    """
    chosen = int(np.argmax(predicted))
    return 1.0 - measured[chosen] / max(measured)


def _ranks(values: Sequence[float]) -> npt.NDArray[np.float64]:
    _, place, counts = np.unique(np.asarray(values, np.float64), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean_rank = last - (counts - 1) / 2
    return np.asarray(mean_rank[place], np.float64)


__all__ = ["rank_correlation", "regret"]
