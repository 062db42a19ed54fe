"""Which of many points can be cut off from the others by a half-space, and a proof either way."""

from __future__ import annotations

import torch

SEPARATED, INSIDE, UNDECIDED = 1, 2, 0


def hull_separation(
    rows: torch.Tensor, classes: torch.Tensor, lower: torch.Tensor, upper: torch.Tensor, start: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each k of ``classes``: a u with (rows_k - rows_i) . u > 0 for all i != k, or multipliers that exclude it.

    rows ``[K, n]``, K of at least 2, distinct; u = (x, s) satisfies s >= 0 and lower s <= x <= upper s, with lower <= 0
    <= upper ``[n - 1]``, infinite where there is no bound. Both answers come from the nearest point to the origin of
    the convex hull of the differences plus the cone of the bounds (Wolfe, Mathematical Programming 11, 1976), found as
    the non-negative least squares problem min |A a - (0, ..., 0, 1)| whose columns are (difference, 1) and (bound, 0)
    (Lawson and Hanson, Solving Least Squares Problems, 1974, section 23.4), all of length one before the last entry.
    Its residual is (-u, s'): where it is not zero, every difference has a product of at least s' with u; where it is
    zero, a holds the multipliers. Columns enter from a working set, which begins with rows of ``start`` and takes up
    rows that violate u, of ``start`` if some do.

    Returns kind ``[M]``, directions ``[M, n]``, rows ``[M, n + 1]`` (-1: none) and their multipliers ``[M, n + 1]``.
    """
    M, n = len(classes), rows.shape[1]
    kind = torch.full((M,), UNDECIDED, dtype=torch.int64)
    directions, multipliers = rows.new_zeros(M, n), rows.new_zeros(M, n + 1)
    support = torch.full((M, n + 1), -1, dtype=torch.int64)
    norms = rows.norm(dim=1)
    for m, k in enumerate(classes.tolist()):
        kind[m], directions[m], used, values = _separate(rows, norms, k, lower, upper, start)
        support[m, : len(used)], multipliers[m, : len(used)] = used, values
    return kind, directions, support, multipliers


def _bounds(rows, lower, upper):
    """The columns of the bounds, one a row: x - lower s, upper s - x, s."""
    eye = torch.eye(rows.shape[1], dtype=rows.dtype)
    low, high = lower.isfinite(), upper.isfinite()
    below, above = eye[:-1][low], -eye[:-1][high]
    below[:, -1], above[:, -1] = -lower[low], upper[high]
    rays = torch.cat([below, above, eye[-1:]])
    return rays / rays.norm(dim=1, keepdim=True)


def _separate(rows, norms, k, lower, upper, start):
    n, eps = rows.shape[1], torch.finfo(rows.dtype).eps
    rays = _bounds(rows, lower, upper)
    target = rows.new_zeros(n + 1)
    target[n] = 1
    columns = torch.cat([rays, rays.new_zeros(len(rays), 1)], 1)
    lengths, ids = rows.new_ones(len(rays)), [-1] * len(rays)

    def take_up(new):
        nonlocal columns, lengths
        known = set(ids)
        new = [i for i in new if i not in known and i != k]
        difference = rows[k] - rows[new]
        length = difference.norm(dim=1)
        column = torch.cat([difference / length[:, None], length.new_ones(len(new), 1)], 1)
        columns, lengths = torch.cat([columns, column]), torch.cat([lengths, length])
        ids.extend(new)
        return bool(new)

    take_up(start[: 4 * n].tolist())
    def missed(which, u, only_violated):
        """Those of the rows that come nearest to violating u, or violate it."""
        gaps = (rows[k] - rows[which]) @ u
        wanted = which != k
        if only_violated:
            wanted &= gaps <= (n + 3) * eps * (norms[which] + norms[k]) * u.norm()
        return which[wanted][gaps[wanted].argsort()[: n + 8]].tolist()

    everyone = torch.arange(len(rows))
    passive, values, residual = [], rows.new_zeros(0), target
    refused: list[int] = []  # columns that rounding would not let in, until another one has come in
    nothing = torch.empty(0, dtype=torch.int64), rows.new_empty(0)
    for _ in range(40 * (n + 10)):
        u, slack = -residual[:n], residual[n]
        # at the very start u is zero, and any row may come first
        violation = columns @ (residual if passive else torch.cat([-rows[k], target[n:]]))
        if not passive:
            violation[: len(rays)] = -torch.inf
        else:  # a row may lack half of its margin, a bound next to nothing, because inputs are cut to the bounds
            violation -= slack * torch.where(torch.arange(len(ids)) < len(rays), 1e-3, 0.5)
        violation[passive + refused] = -torch.inf
        worst = int(violation.argmax()) if len(ids) > len(rays) else -1
        if worst < 0 or (passive and violation[worst] <= 0):
            if not any(take_up(missed(which, u if passive else rows[k], bool(passive))) for which in (start, everyone)):
                return (UNDECIDED if missed(everyone, u, True) else SEPARATED), u, *nothing
            continue
        passive.append(worst)
        values = torch.cat([values, values.new_zeros(1)])
        while True:
            q, r = torch.linalg.qr(columns[passive].T)
            best = torch.linalg.solve_triangular(r, (q.T @ target)[:, None], upper=True)[:, 0]
            if (best > 0).all():
                values = best
                break
            falling = best <= 0
            step = (values[falling] / (values[falling] - best[falling]).clamp(min=1e-300)).min().clamp(max=1)
            values = values + step * (best - values)
            stay = values > 1e-15
            stay[falling & (values == values[falling].min())] = False
            passive = [column for column, keep in zip(passive, stay.tolist()) if keep]
            values = values[stay]
        refused = [] if worst in passive else [*refused, worst]
        residual = target - q @ (q.T @ target)
        residual = residual - q @ (q.T @ residual)  # twice: a short residual is orthogonal to the columns, too
        if residual.norm() < 1e-13:
            weights = values / lengths[passive]
            used = [(ids[c], w) for c, w in zip(passive, weights.tolist()) if ids[c] >= 0]
            total = sum(w for _, w in used)
            shares = torch.tensor([w / total for _, w in used], dtype=rows.dtype)
            return INSIDE, u, torch.tensor([i for i, _ in used]), shares
    return UNDECIDED, u, *nothing
