"""Alpha of the weighted least squares fit in exact rational arithmetic: no rounding at all.

Solves the normal equations of the three coefficients as they stand, by Cramer's rule over fractions.
"""

from __future__ import annotations

from fractions import Fraction

FLOOR = Fraction(1, 10**10)


def exact_alpha(step_length, losses, slopes, loss_variances, slope_variances):
    """Alpha, or None where the system is singular or the start slope vanishes; -1 for a concave fit."""
    t = Fraction(step_length)
    rows = [(1, 0, 0), (1, t, t * t), (0, 1, 0), (0, 1, 2 * t)]
    values = [Fraction(v) for v in (*losses, *slopes)]
    noise = [Fraction(v) or FLOOR for v in (*loss_variances, *slope_variances)]
    normal = [
        [sum(Fraction(row[i]) * row[j] / var for row, var in zip(rows, noise, strict=True)) for j in range(3)]
        for i in range(3)
    ]
    right = [
        sum(Fraction(row[i]) * value / var for row, value, var in zip(rows, values, noise, strict=True))
        for i in range(3)
    ]
    determinant = _determinant(normal)
    if determinant == 0:
        return None
    _, w1, w2 = (_determinant(_with_column(normal, right, k)) / determinant for k in range(3))
    if w2 < 0:
        return -1.0
    if w1 == 0:
        return None
    return float(-1 - 2 * t * w2 / w1)


def _determinant(m):
    return (
        m[0][0] * (m[1][1] * m[2][2] - m[1][2] * m[2][1])
        - m[0][1] * (m[1][0] * m[2][2] - m[1][2] * m[2][0])
        + m[0][2] * (m[1][0] * m[2][1] - m[1][1] * m[2][0])
    )


def _with_column(matrix, column, k):
    return [[column[i] if j == k else matrix[i][j] for j in range(3)] for i in range(3)]
