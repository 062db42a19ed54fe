"""The search for classes that can never win: cheap witnesses first, in float32 with a proven bound, then exactly."""

from __future__ import annotations

import functools
import time
from bisect import bisect_right

import numpy as np
import torch
from tqdm import tqdm

from supy import _extension
from supy._checkpoint import Checkpoint
from supy._checks import require
from supy.argmax.certificates import Hints, Layer, Report, rounding_only, wins
from supy.argmax.witnesses import EasyWitnesses
from supy.reference.hull_separation import INSIDE, SEPARATED, hull_separation

_BLOCK = 1 << 18  # numbers that are hashed at once
_SAVE = 1.0  # seconds from one checkpoint to the next, at least
_CHUNK = 128  # classes decided at a time, at first: what excludes them is tried first for the next


def find_unargmaxable(weight, bias=None, *, bound=None, nonnegative: bool = False, lower=None, upper=None,
                      tolerance: float = 1e-12, progress: bool = False, checkpoint=None,
                      previous: Report | None = None) -> Report:  # fmt: skip
    """Finds every class that no input can make the argmax of ``weight @ x + bias``, and proves each verdict.

    Args:
        weight: ``[K, d]``, a tensor or array of floats; float32 and float64 in CPU memory are kept, not copied. Of a
            tensor on a CUDA device the easy witnesses are found there; the rest, and every certificate, on the CPU.
        bias: ``[K]``.
        bound: only inputs with ``|x_j| <= bound`` count.
        nonnegative: only inputs with ``x_j >= 0`` count, as behind a ReLU.
        lower, upper: a number or ``[d]``: only inputs with ``lower <= x <= upper`` count. Combines with the above.
        tolerance: the rounding errors that multipliers may have, relative to the magnitudes of weights and logits.
        progress: whether to show a progress bar.
        checkpoint: a folder that keeps what is decided, every few seconds and when interrupted: the same search,
            started again, goes on from there to the same result. The caller removes it once the report is safe.
        previous: the report of this layer before some training: what made a class win then is tried early.

    Returns:
        A :class:`Report`; ``report.verdicts`` is a list of K strings, ``report.certificate(k)`` the proof:

        * ``"argmaxable"``: a witness x for which class k wins by more than the rounding errors of the check;
        * ``"tied"``: the same for a group of identical rows against the others;
        * ``"unargmaxable"``: multipliers of other classes whose averaged logit is never below that of class k. The
          strict definition: a class that can equal the maximum, but exceed it nowhere, is one of them;
        * ``"undecided"``: neither could be proven within rounding.

        Verdicts and certificates do not depend on the number of threads.

    Raises:
        ValueError: a shape, a NaN, an infinite weight, a lower bound above an upper one; a checkpoint that is damaged
            or of another layer or other options.

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
    groups: dict[int, tuple[int, ...]] = {}  # of more than one class, by the number of their row
    if len(first) < K:
        order = np.argsort(group_of, kind="stable")
        parts = np.split(order, np.flatnonzero(np.diff(group_of[order])) + 1)
        groups = {row: tuple(members.tolist()) for row, members in enumerate(parts) if len(members) > 1}

    problem = _Problem(layer, first)
    source = weight.detach() if isinstance(weight, torch.Tensor) and weight.is_cuda else None
    easy, exact = EasyWitnesses(problem), _Exact(len(first))
    saved = None
    if checkpoint is not None:
        saved = Checkpoint(checkpoint, {"layer": layer.digest(), "tolerance": tolerance})
    if previous is not None:
        fits = previous.layer.weight.shape == layer.weight.shape
        require(fits, op, "previous is the report of a layer of another shape")
        easy.popularity += previous.hints.popularity[first]

    def before(row: int) -> np.ndarray | None:
        x = None if previous is None else previous.hints.inputs(first[row])
        return None if x is None else (x - problem.origin) / problem.unit

    with tqdm(total=len(first), desc="classes", disable=not progress, unit="class") as bar:
        if saved is None or not _load(saved, easy, exact):
            easy.search(source, before, bar)
            exact.popularity = easy.popularity
        else:
            bar.update(len(first) - exact.remaining(easy))
        problem.decide(easy, exact, groups, tolerance, bar, lambda: _save(saved, easy, exact))

    def explicit(k: int) -> np.ndarray | None:
        """A witness that is not just the row of its class."""
        row = group_of[k]
        x = easy.stored.get(row)
        return exact.witnesses.get(row) if x is None else problem.input(x.astype(np.float64), 1.0)

    def witness(k: int) -> np.ndarray:
        x = explicit(k)
        return problem.input(easy.get(group_of[k]).astype(np.float64), 1.0) if x is None else x

    names = np.where(easy.found, "argmaxable", "undecided").astype(object)
    names[list(exact.witnesses)] = "argmaxable"
    names[exact.place >= 0] = "unargmaxable"
    for row in groups:
        names[row] = "tied" if names[row] == "argmaxable" else names[row]
    verdicts = names[group_of].tolist() if K else []
    hints = Hints(explicit, exact.popularity[group_of])
    return Report(layer, verdicts, witness, lambda k: exact.get(group_of[k]), lambda k: groups[group_of[k]], hints)


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


class _Exact:
    """What the exact search has found of ``done`` of its rows: witnesses, and multipliers of dominated rows, packed."""

    def __init__(self, K: int):
        self.done, self.size, self.popularity = 0, _CHUNK, np.zeros(K, np.int64)
        self.witnesses: dict[int, np.ndarray] = {}
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

    def remaining(self, easy: EasyWitnesses) -> int:
        return int((~easy.found).sum()) - self.done

    def tensors(self) -> dict[str, torch.Tensor]:
        arrays = {"place": self.place, "popularity": self.popularity}
        arrays["rows"] = np.array(list(self.witnesses), dtype=np.int64)
        if self.witnesses:
            arrays["inputs"] = np.stack(list(self.witnesses.values()))
        if self.parts:
            arrays["classes"], arrays["multipliers"] = (np.concatenate(part) for part in zip(*self.parts))
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def restore(self, tensors: dict[str, torch.Tensor], done: int, size: int) -> None:
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        self.done, self.size, self.popularity, self.place = done, size, arrays["popularity"], arrays["place"]
        self.witnesses = dict(zip(arrays["rows"].tolist(), arrays.get("inputs", ())))
        if "classes" in arrays:
            self.parts = [(arrays["classes"], arrays["multipliers"])]
            self.starts = [0, len(arrays["classes"])]


def _save(to: Checkpoint | None, easy: EasyWitnesses, exact: _Exact) -> None:
    if to is not None:
        to.save({"easy": easy.tensors(), "exact": exact.tensors()}, {"done": exact.done, "size": exact.size})


def _load(saved: Checkpoint, easy: EasyWitnesses, exact: _Exact) -> bool:
    """Whether there was something to go on with."""
    state = saved.load()
    if state is None:
        return False
    try:
        groups, progress = state
        easy.restore(groups["easy"])
        exact.restore(groups["exact"], int(progress["done"]), int(progress["size"]))
        if not len(easy.kind) == len(exact.place) == len(exact.popularity) == len(easy.problem.first):
            raise ValueError("of another number of classes")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{saved.path}: not the state of a search ({error})") from None
    return True


class _Problem:
    """The distinct rows, scaled and shifted so that their entries are at most about 1 and the bounds contain 0."""

    def __init__(self, layer: Layer, first: np.ndarray):
        self.layer, self.first = layer, first
        self.origin = np.clip(0.0, layer.lower, layer.upper)
        weight, bias = layer.weight, layer.bias[first]
        shifted = bias + (weight @ self.origin)[first] if self.origin.any() else bias
        shifted = shifted - (shifted[0] if len(first) else 0.0)
        size = _power_of_two(max(float(weight.max(initial=0.0)), -float(weight.min(initial=0.0))))
        limits = np.concatenate([layer.lower - self.origin, layer.upper - self.origin])
        reach = float(np.abs(limits[np.isfinite(limits)]).max(initial=0.0))
        height = float(np.abs(shifted).max(initial=0.0))
        self.unit = _power_of_two(height or size * reach) / size  # one unit of x in the scaled problem
        self.size, self.bias = size, shifted / (self.unit * size)
        # what shifting may have changed of a logit, in the scaled problem
        origin = size * float(np.abs(self.origin).sum())
        changed = (weight.shape[1] + 8) * 2.0**-50 * (origin + float(np.abs(bias).max(initial=0.0)))
        self.blur = changed / (self.unit * size)
        self.lower, self.upper = (layer.lower - self.origin) / self.unit, (layer.upper - self.origin) / self.unit

    def scaled(self, index) -> np.ndarray:
        """The weights of these rows in float64."""
        return self.layer.rows(self.first[index]) / self.size

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """All scaled rows, each with its bias: float64 `[K, d + 1]`, which only the exact search needs."""
        rows = np.empty((len(self.first), self.layer.weight.shape[1] + 1))
        for begin in range(0, len(rows), 4096):
            part = slice(begin, begin + 4096)
            rows[part, :-1] = self.scaled(part)
        rows[:, -1] = self.bias
        return rows

    def input(self, x: np.ndarray, s) -> np.ndarray:
        """The input of the layer that the scaled (x, s) stands for."""
        return np.clip(self.origin + x / s * self.unit, self.layer.lower, self.layer.upper)

    def decide(self, easy: EasyWitnesses, exact: _Exact, groups, tolerance: float, bar, save) -> None:
        """Decides the rows that ``easy`` has left; what is neither a witness nor dominated then is undecided."""
        K, n = len(self.first), len(self.lower) + 1
        lower, upper = torch.from_numpy(self.lower), torch.from_numpy(self.upper)
        classes = np.flatnonzero(~easy.found)
        if K == 1:
            exact.witnesses, exact.done = {0: self.origin}, 1
        # About 10 s of work at a time, so that no more is lost when it is interrupted (operations, as measured).
        most = max(64, int(1e12 / (54 * n**3 + 5 * K * n)))
        saved, seconds = time.monotonic(), 0.0
        if exact.done == 0:
            save()
        while exact.done < len(classes):
            chunk = classes[exact.done : exact.done + exact.size]
            used = np.flatnonzero(exact.popularity)
            start = torch.from_numpy(used[np.argsort(-exact.popularity[used], kind="stable")])
            try:
                kind, direction, support, values = (
                    t.numpy()
                    for t in _separate(torch.from_numpy(self.rows), torch.from_numpy(chunk), lower, upper, start)
                )
                apart = np.flatnonzero(kind == SEPARATED)
                inputs = self._witnesses(chunk[apart], direction[apart], groups)
                inside = np.flatnonzero(kind == INSIDE)
                others, multipliers = self.first[support[inside]], values[inside]  # -1, of multiplier 0: any class
                sound = rounding_only(self.layer, self.first[chunk[inside]], others, multipliers, tolerance)
                # What should have been 0 is, beside rows of zeros, all that is left.
                odd = np.flatnonzero(~sound)
                multipliers[odd] *= multipliers[odd] > 1e-12
                multipliers[odd] /= multipliers[odd].sum(1, keepdims=True)
                who = self.first[chunk[inside[odd]]]
                sound[odd] = rounding_only(self.layer, who, others[odd], multipliers[odd], tolerance)
            except KeyboardInterrupt:
                save()
                raise
            exact.witnesses.update((k, x) for k, x in zip(chunk[apart].tolist(), inputs) if x is not None)
            exact.add(chunk[inside[sound]], others[sound], multipliers[sound])
            np.add.at(exact.popularity, support[inside][support[inside] >= 0], 1)
            exact.done += len(chunk)
            exact.size = min(2 * exact.size, max(4096, K // 64), most)
            bar.update(len(chunk))
            if time.monotonic() - saved > max(_SAVE, 20 * seconds):
                saved = time.monotonic()
                save()
                seconds = time.monotonic() - saved
        save()
        self.__dict__.pop("rows", None)

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
        members = [groups.get(row, (int(self.first[row]),)) for row in rows[which].tolist()]
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
