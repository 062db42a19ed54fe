"""The search for classes that can never win: cheap witnesses first, in float32 with a proven bound, then exactly."""

from __future__ import annotations

from bisect import bisect_right

import numpy as np
import torch
from tqdm import tqdm

from supy import _extension
from supy.argmax.certificates import Layer, Report, rounding_only, wins
from supy.reference.hull_separation import INSIDE, SEPARATED, hull_separation

_BLOCK = 1 << 23  # entries of a product that are held at once
_CHUNK = 128  # classes decided at a time, at first: what excludes them is tried first for the next


def find_unargmaxable(weight, bias=None, *, bound=None, nonnegative: bool = False, lower=None, upper=None,
                      tolerance: float = 1e-12, progress: bool = False) -> Report:  # fmt: skip
    """Finds every class that no input can make the argmax of ``weight @ x + bias``, and proves each verdict.

    Args:
        weight: ``[K, d]``, a tensor or array of floats; float32 and float64 in CPU memory are kept, not copied.
        bias: ``[K]``.
        bound: only inputs with ``|x_j| <= bound`` count.
        nonnegative: only inputs with ``x_j >= 0`` count, as behind a ReLU.
        lower, upper: a number or ``[d]``: only inputs with ``lower <= x <= upper`` count. Combines with the above.
        tolerance: the rounding errors that multipliers may have, relative to the magnitudes of weights and logits.
        progress: whether to show a progress bar.

    Returns:
        A :class:`Report`; ``report.verdicts`` is a list of K strings, ``report.certificate(k)`` the proof:

        * ``"argmaxable"``: a witness x for which class k wins by more than the rounding errors of the check;
        * ``"tied"``: the same for a group of identical rows against the others;
        * ``"unargmaxable"``: multipliers of other classes whose averaged logit is never below that of class k. The
          strict definition: a class that can equal the maximum, but exceed it nowhere, is one of them;
        * ``"undecided"``: neither could be proven within rounding.

        Verdicts and certificates do not depend on the number of threads.

    Raises:
        ValueError: a shape, a NaN, an infinite weight, a lower bound above an upper one.

    Class k is dominated exactly if a convex combination of the differences (w_k - w_i, b_k - b_i) is at most 0 on all
    allowed (x, 1) (Farkas); the nearest point of a hull and a cone settles it either way, see
    ``supy/reference/hull_separation.py``.

    >>> report = find_unargmaxable(torch.tensor([[1.0], [2.0], [3.0]]))
    >>> report
    Report(2 argmaxable, 1 unargmaxable)
    >>> {k: round(value, 6) for k, value in report.certificate(1).dominators.items()}
    {0: 0.5, 2: 0.5}
    >>> find_unargmaxable(torch.tensor([[1.0], [2.0], [3.0]]), nonnegative=True).verdicts
    ['unargmaxable', 'unargmaxable', 'argmaxable']
    """
    op = "argmax.find_unargmaxable"
    layer = read_layer(op, weight, bias, bound, nonnegative, lower, upper)
    if not 0 < tolerance < 1:
        raise ValueError(f"supy.{op}: tolerance is {tolerance}, expected a number between 0 and 1")
    K = len(layer.weight)
    first, group_of = _distinct(layer)
    groups: dict[int, np.ndarray] = {}  # of more than one class, by the number of their row
    if len(first) < K:
        order = np.argsort(group_of, kind="stable")
        parts = np.split(order, np.flatnonzero(np.diff(group_of[order])) + 1)
        groups = {row: members for row, members in enumerate(parts) if len(members) > 1}

    problem = _Problem(layer, first)
    with tqdm(total=len(first), desc="classes", disable=not progress, unit="class") as bar:
        easy, found, popularity = problem.easy_witnesses(bar)
        exact, dominators = problem.decide(np.flatnonzero(~found), popularity, groups, tolerance, bar)

    def witness(k: int) -> np.ndarray:
        group = group_of[k]
        return exact[group] if group in exact else problem.input(easy[group].astype(np.float64), 1.0)

    names = np.where(found, "argmaxable", "undecided").astype(object)
    names[list(exact)] = "argmaxable"
    names[dominators.place >= 0] = "unargmaxable"
    for row in groups:
        names[row] = "tied" if names[row] == "argmaxable" else names[row]
    verdicts = names[group_of].tolist() if K else []
    return Report(layer, verdicts, witness, lambda k: dominators.get(group_of[k]), lambda k: groups[group_of[k]])


def read_layer(op: str, weight, bias, bound, nonnegative, lower, upper) -> Layer:
    """Checked arguments; half precision becomes float32, anything else but float32 becomes float64."""
    weight = _array(op, "weight", weight)
    if weight.ndim != 2 or weight.shape[1] == 0:
        raise ValueError(f"supy.{op}: weight has shape {list(weight.shape)}, expected [K, d] with d > 0")
    K, d = weight.shape
    bias = np.zeros(K) if bias is None else _array(op, "bias", bias).astype(np.float64)
    if bias.shape != (K,):
        raise ValueError(f"supy.{op}: bias has shape {list(bias.shape)}, expected [K] with K={K} (from weight)")
    for name, array in (("weight", weight), ("bias", bias)):
        if array.size and not (np.isfinite(array.min()) and np.isfinite(array.max())):
            where = np.argwhere(~np.isfinite(array))[0].tolist()
            raise ValueError(f"supy.{op}: {name} has a NaN or infinite value at {where}")
    limits = {"lower": np.full(d, -np.inf), "upper": np.full(d, np.inf)}
    for name, given in (("lower", lower), ("upper", upper)):
        if given is not None:
            values = _array(op, name, given).astype(np.float64)
            if values.shape not in ((), (1,), (d,)) or np.isnan(values).any():
                raise ValueError(f"supy.{op}: {name} is {given}, expected a number or [d] numbers with d={d}")
            limits[name][:] = values
    if bound is not None:
        if not bound >= 0:
            raise ValueError(f"supy.{op}: bound is {bound}, expected a number of at least 0")
        limits["lower"], limits["upper"] = np.maximum(limits["lower"], -bound), np.minimum(limits["upper"], bound)
    if nonnegative:
        limits["lower"] = np.maximum(limits["lower"], 0.0)
    low, high = limits["lower"], limits["upper"]
    empty = (low > high) | (low == np.inf) | (high == -np.inf)
    if empty.any():
        j = int(empty.argmax())
        raise ValueError(f"supy.{op}: no x_{j} is at least {low[j]} (lower) and at most {high[j]} (upper)")
    return Layer(weight, bias, low + 0.0, high + 0.0)


def _array(op: str, name: str, value) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value).numpy()
    try:
        array = np.asarray(value)
        if array.dtype.kind not in "fiub":
            raise TypeError(f"dtype {array.dtype}")
    except (TypeError, ValueError) as error:
        raise TypeError(f"supy.{op}: {name} is {type(value).__name__} ({error}), expected floats") from None
    if array.dtype == np.float16:
        return array.astype(np.float32)
    return array if array.dtype == np.float32 else array.astype(np.float64, copy=False)


def _distinct(layer: Layer) -> tuple[np.ndarray, np.ndarray]:
    """The first class of each distinct row, ascending, and for each class which of them has its row; by hashing."""
    K, d = layer.weight.shape
    factors = np.random.default_rng(0).integers(0, 1 << 63, d + 1, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    hashes = np.empty(K, dtype=np.uint64)
    step = max(1, _BLOCK // (d + 1))
    for begin in range(0, K, step):
        part = slice(begin, begin + step)
        rows = np.column_stack([layer.weight[part], layer.bias[part]]).astype(np.float64) + 0.0  # -0.0 becomes 0.0
        bits = rows.view(np.uint64)
        bits ^= bits >> np.uint64(32)  # the low bits of short numbers are zeros
        hashes[part] = (bits * factors).sum(1, dtype=np.uint64)
    _, first, group_of = np.unique(hashes, return_index=True, return_inverse=True)
    for k in np.flatnonzero(first[group_of] != np.arange(K)).tolist():
        twin = first[group_of[k]]
        if layer.bias[k] != layer.bias[twin] or (layer.weight[k] != layer.weight[twin]).any():
            rows = np.column_stack([layer.weight, layer.bias]) + 0.0  # two rows with one hash: never seen
            _, first, group_of = np.unique(rows, axis=0, return_index=True, return_inverse=True)
            break
    order = np.argsort(first)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return first[order], place[group_of.ravel()]


class _Dominators:
    """The multipliers of many rows, packed."""

    def __init__(self, K: int):
        self.place = np.full(K, -1)
        self.parts: list[tuple[np.ndarray, np.ndarray]] = []
        self.starts = [0]

    def add(self, rows: np.ndarray, classes: np.ndarray, multipliers: np.ndarray) -> None:
        self.place[rows] = self.starts[-1] + np.arange(len(rows))
        self.parts.append((classes, multipliers))
        self.starts.append(self.starts[-1] + len(rows))

    def get(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        part = bisect_right(self.starts, self.place[row]) - 1
        classes, multipliers = (array[self.place[row] - self.starts[part]] for array in self.parts[part])
        return classes[multipliers > 0], multipliers[multipliers > 0]


class _Problem:
    """The distinct rows, scaled and shifted so that their entries are at most about 1 and the bounds contain 0."""

    def __init__(self, layer: Layer, first: np.ndarray):
        self.layer, self.first = layer, first
        self.origin = np.clip(0.0, layer.lower, layer.upper)
        weight = layer.weight if len(first) == len(layer.weight) else layer.weight[first]
        bias = layer.bias[first]
        shifted = bias + weight @ self.origin if self.origin.any() else bias
        shifted = shifted - (shifted[0] if len(first) else 0.0)
        size = _power_of_two(float(np.abs(weight).max(initial=0.0)))
        limits = np.concatenate([layer.lower - self.origin, layer.upper - self.origin])
        reach = float(np.abs(limits[np.isfinite(limits)]).max(initial=0.0))
        height = float(np.abs(shifted).max(initial=0.0))
        self.unit = _power_of_two(height or size * reach) / size  # one unit of x in the scaled problem
        self.rows = np.empty((len(weight), weight.shape[1] + 1))
        np.divide(weight, size, out=self.rows[:, :-1], dtype=np.float64)
        self.rows[:, -1] = shifted / (self.unit * size)
        # what shifting may have changed of a logit, in the scaled problem
        origin = size * float(np.abs(self.origin).sum())
        changed = (weight.shape[1] + 8) * 2.0**-50 * (origin + float(np.abs(bias).max(initial=0.0)))
        self.blur = changed / (self.unit * size)
        self.lower, self.upper = (layer.lower - self.origin) / self.unit, (layer.upper - self.origin) / self.unit

    def input(self, x: np.ndarray, s) -> np.ndarray:
        """The input of the layer that the scaled (x, s) stands for."""
        return np.clip(self.origin + x / s * self.unit, self.layer.lower, self.layer.upper)

    def easy_witnesses(self, bar) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Inputs for most classes, which of them are proven, and how often each row was in the way of another.

        The directions are the class's own row, that row less the mean and its product with the inverse covariance, at
        several lengths; then reflections at the boundary to whatever class wins (arXiv 2203.06462, section 3.2).
        """
        K, n = self.rows.shape
        d = n - 1
        rows = torch.from_numpy(self.rows)
        weight, bias = rows[:, :d].float().contiguous(), rows[:, d].float()
        witness = torch.zeros(K, d)
        found, popularity = torch.zeros(K, dtype=torch.bool), torch.zeros(K, dtype=torch.int64)
        low, high = _inward(self.lower, self.upper)
        if K < 2 or (low > high).any():
            return witness.numpy(), found.numpy(), popularity.numpy()
        largest, highest = float(weight.norm(dim=1).max()), float(bias.abs().max())
        unit = (d + 8) * 2.0**-23  # rounding of the rows and of the product, twice what the analysis asks for

        def attempt(x: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
            """Which row wins instead of each of ``left``."""
            rival = torch.zeros_like(left)
            step = max(1, _BLOCK // K)
            for begin in range(0, len(left), step):
                part = slice(begin, begin + step)
                k, at = left[part], torch.arange(len(left[part]))
                logits = torch.addmm(bias, x[part], weight.T)
                own = logits[at, k]
                logits[at, k] = -torch.inf
                best, rival[part] = logits.max(1)
                won = own - best > unit * (2 * largest * x[part].norm(dim=1) + 2 * highest) + self.blur
                witness[k[won]] = x[part][won]
                bar.update(int((won & ~found[k]).sum()))
                found[k[won]] = True
            popularity.index_add_(0, rival[~found[left]], torch.ones_like(rival[~found[left]]))
            return rival

        mean = rows[:, :d].mean(0)
        spread = rows[:, :d].T @ rows[:, :d] / K - torch.outer(mean, mean)
        ridge = 1e-9 * abs(float(spread.trace())) / d + 1e-300
        inverse = torch.linalg.inv_ex(spread + ridge * torch.eye(d, dtype=rows.dtype))[0]
        inverse = (inverse / inverse.norm() * d**0.5).float()
        mean = mean.float()
        # A pass must win this share of its classes to be cheaper than deciding those exactly (operations, as measured).
        worthwhile = 0.7 * K * (2 * n + 25) / (54 * n**3 + K * (5 * n + 60))

        def remaining() -> torch.Tensor:
            return torch.nonzero(~found)[:, 0]

        x = weight.clamp(low, high)
        for direction in (
            lambda k: weight[k],
            lambda k: 10 * (weight[k] - mean),
            lambda k: (10 * (weight[k] - mean)) @ inverse,
            lambda k: (100 * (weight[k] - mean)) @ inverse,
        ):
            left = remaining()
            sample = left[:: max(1, len(left) // 256)]
            attempt(direction(sample).clamp(low, high), sample)
            if found[sample].sum() < worthwhile * len(sample):
                continue
            left = remaining()
            x[left] = direction(left).clamp(low, high)
            attempt(x[left], left)

        def reflections(k: torch.Tensor, most: int) -> None:
            """Reflects each input at the boundary between its class and the one that wins, while that pays."""
            at = x[k]
            rival = attempt(at, k)
            for _ in range(most):
                keep = ~found[k]
                k, at, rival = k[keep], at[keep], rival[keep]
                if len(k) == 0:
                    return
                normal = weight[k] - weight[rival]
                height = (normal * at).sum(1) + bias[k] - bias[rival]
                at = (at - (2 * height / normal.square().sum(1).clamp(min=1e-30))[:, None] * normal).clamp(low, high)
                rival = attempt(at, k)
                if found[k].sum() < 0.5 * worthwhile * len(k):
                    return

        left = remaining()
        sample = left[:: max(1, len(left) // 256)]
        reflections(sample, 2)
        if len(left) and found[sample].sum() >= worthwhile * len(sample):
            reflections(remaining(), 30)
        return witness.numpy(), found.numpy(), popularity.numpy()

    def decide(self, classes: np.ndarray, popularity: np.ndarray, groups, tolerance: float, bar):
        """({row: witness}, dominators) of the rows ``classes``; a row in neither is undecided."""
        K, n = self.rows.shape
        witnesses, dominators = {}, _Dominators(K)
        rows = torch.from_numpy(self.rows)
        lower, upper = torch.from_numpy(self.lower), torch.from_numpy(self.upper)
        if K == 1:
            return {0: self.origin}, dominators
        size = _CHUNK
        while len(classes):
            chunk, classes = classes[:size], classes[size:]
            size = min(2 * size, max(4096, K // 64))
            used = np.flatnonzero(popularity)
            start = torch.from_numpy(used[np.argsort(-popularity[used], kind="stable")])
            kind, direction, support, values = (
                t.numpy() for t in _separate(rows, torch.from_numpy(chunk), lower, upper, start)
            )
            apart = np.flatnonzero(kind == SEPARATED)
            for m, x in zip(apart, self._witnesses(chunk[apart], direction[apart], groups)):
                if x is not None:
                    witnesses[chunk[m]] = x
            inside = np.flatnonzero(kind == INSIDE)
            others, multipliers = self.first[support[inside]], values[inside]  # -1, with multiplier 0, becomes a class
            np.add.at(popularity, support[inside][support[inside] >= 0], 1)
            sound = rounding_only(self.layer, self.first[chunk[inside]], others, multipliers, tolerance)
            dominators.add(chunk[inside[sound]], others[sound], multipliers[sound])
            bar.update(len(chunk))
        return witnesses, dominators

    def _witnesses(self, rows, directions, groups) -> list[np.ndarray | None]:
        """Inputs in the given directions that pass the check, or None."""
        found: list[np.ndarray | None] = [None] * len(rows)
        last, length = directions[:, -1], np.linalg.norm(directions, axis=1)
        self._confirm(found, rows, np.flatnonzero(last > 1e-6 * length), directions, last, groups)
        # Otherwise a longer last entry brings x nearer to the origin, at half of the margin.
        left = np.array([m for m, x in enumerate(found) if x is None], dtype=np.int64)
        raised = np.zeros(len(rows))
        falls = self.rows[:, -1].max(initial=0.0) - self.rows[rows, -1]
        for m in left.tolist():
            step = length[m]
            if falls[m] > 0:
                gaps = (self.rows[rows[m]] - self.rows) @ directions[m]
                step = np.delete(gaps, rows[m]).min() / (2 * falls[m])
            raised[m] = max(last[m], 0.0) + step
        self._confirm(found, rows, left[raised[left] > 0], directions, raised, groups)
        return found

    def _confirm(self, found, rows, which, directions, last, groups) -> None:
        if len(which) == 0:
            return
        x = self.input(directions[which, :-1], last[which, None])
        whole = np.isfinite(x).all(1)
        which, x = which[whole], x[whole]
        members = [groups.get(row, self.first[[row]]) for row in rows[which].tolist()]
        for m in np.flatnonzero(wins(self.layer, x, members)):
            found[which[m]] = x[m]


def _separate(rows, classes, lower, upper, start):
    """``hull_separation``, in C++ where it is built."""
    if _extension.C is None:
        return hull_separation(rows, classes, lower, upper, start)
    M, n = len(classes), rows.shape[1]
    kind, support = torch.empty(M, dtype=torch.int64), torch.empty(M, n + 1, dtype=torch.int64)
    directions, multipliers = rows.new_empty(M, n), rows.new_empty(M, n + 1)
    _extension.C.hull_separation(rows, classes, lower, upper, start, kind, directions, support, multipliers)
    return kind, directions, support, multipliers


def _power_of_two(x: float) -> float:
    """The least power of two that is at least x; 1 for 0."""
    return float(2.0 ** np.ceil(np.log2(x))) if x > 0 else 1.0


def _inward(lower: np.ndarray, upper: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 bounds that imply the given ones."""
    low, high = lower.astype(np.float32), upper.astype(np.float32)
    low = np.where(low < lower, np.nextafter(low, np.float32(np.inf)), low)
    high = np.where(high > upper, np.nextafter(high, np.float32(-np.inf)), high)
    return torch.from_numpy(low), torch.from_numpy(high)
