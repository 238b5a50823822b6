"""How far the roundings of a sum reach: in the worst case, by chance, and where they fall the same way.

The worst case over all orders of summation is ``gamma(n) sum|x_i w_i|``. By chance far less: the k-th addition is
off by at most ``u |s_k|``, s_k the sum so far, independently of the others, so what counts is ``sum s_k**2``. In an
order that has nothing to do with the numbers, s_k goes from 0 to the whole sum s as a random walk that is tied down at
both ends: ``(k/n) s`` give or take a Brownian bridge of size ``q = sqrt(sum (x_i w_i)**2)``. The first part adds up to
``n s**2 / 3``; the second to ``n q**2`` times 1/6 on average and below 1/2 for 96 of 100 orders (the distribution of
Cramer and von Mises). So ``n (s**2 / 3 + q**2 / 2)``; the n products add ``q**2``. Adding in blocks only makes the s_k
smaller.

Chance it is not where one addend is so large that the unit of the sum is larger than the others: added to it one by one
they vanish, all the same way. What is lost is at most each of them, so all of them together are allowed for.

References
----------
Higham, "Accuracy and Stability of Numerical Algorithms", 2nd edition, 2002, sections 3.1 and 4.2 (gamma; any order);
Higham and Mary, "A New Approach to Probabilistic Rounding Error Analysis", SIAM J. Sci. Comput. 41, 2019 (independent
roundings: sqrt(n) in place of n) and "Sharper Probabilistic Backward Error Analysis for Basic Linear Algebra Kernels
with Random Data", 42, 2020 (what the mean and spread of the data add to that); Anderson and Darling, "Asymptotic Theory
of Certain Goodness of Fit Criteria Based on Stochastic Processes", 1952, table 1 (quantiles of the square of a bridge).
"""

from __future__ import annotations

import numpy as np

from refgemma.numerics import Array
from refgemma.oracle.bounds.slack import Size


def gamma(n: Size, unit: float) -> Size:
    """Worst relative error of n roundings in a row.

    Higham, 2002, lemma 3.1.
    """
    reach = np.asarray(n * unit)
    return np.where(reach < 1, reach / np.maximum(1 - reach, 1e-300), np.inf)


def chance_of_sum(exact: Array, squares: Array, n: Size, unit: float) -> Array:
    """Variance of the error of a sum of n products, see the head of this file."""
    variance: Array = unit**2 * (n * (np.square(exact) / 3 + squares / 2) + squares)
    return variance


def swallowed(addends: Array, unit: float) -> Array:
    """Most that vanishes of a sum of positive addends, one large and added first, as the others are below its unit.

    addends (..., n).
    """
    ulp = 2 * unit * addends.sum(axis=-1, keepdims=True)
    lost: Array = np.where(addends <= ulp, np.minimum(addends, ulp / 2), 0).sum(axis=-1, keepdims=True)
    return lost


def swallowed_by_one(magnitude: Array, squares: Array, n: Size, unit: float) -> Array:
    """Same of addends that are known by their sums alone."""
    others = np.maximum(magnitude - np.sqrt(squares), 0)
    lost: Array = np.where(others <= 2 * n * unit * magnitude, others, 0)
    return lost
