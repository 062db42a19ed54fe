"""Verdicts with proofs, and their check in float64, which does not depend on how they were found."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

VERDICTS = ("argmaxable", "unargmaxable", "tied", "undecided")
_BLOCK = 1 << 22  # entries of a product that are held at once


@dataclass(frozen=True)
class Layer:
    """Logits W x + b with lower <= x <= upper: weight ``[K, d]``, bias ``[K]``, lower and upper ``[d]``."""

    weight: np.ndarray
    bias: np.ndarray
    lower: np.ndarray
    upper: np.ndarray

    def rows(self, index) -> np.ndarray:
        return self.weight[index].astype(np.float64, copy=False)

    def digest(self) -> str:
        arrays = (self.weight, self.bias, self.lower, self.upper)
        text = f"{self.weight.shape} {self.weight.dtype}"
        return hashlib.sha256(b"".join([text.encode(), *(_digest(array) for array in arrays)])).hexdigest()


def _digest(array: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(array)).digest()


@dataclass(frozen=True)
class Certificate:
    """Why class ``index`` has its verdict.

    argmaxable: with the input ``witness`` its logit exceeds every other one by ``margin``, which is more than
    ``rounding``, a bound of the rounding errors of the float64 evaluation: the claim holds in exact arithmetic.

    tied: the classes ``twins``, this one among them, have the same weights and bias, and with ``witness`` all of them
    exceed the others by ``margin``. (Without others the margin is infinite.)

    unargmaxable: the multipliers ``dominators`` (class: multiplier, positive, of sum one) average the logits of other
    classes; for every allowed x that average exceeds this class's logit by ``surplus`` or more, up to the product of x
    with a vector of components up to ``residual``. What contradicts is rounding at most: residual <= tolerance *
    (weights) and surplus >= -tolerance * (logits), in the magnitudes of the rows concerned. A class that may equal the
    maximum but never exceeds it (it lies on the surface of the hull of the others, say) is unargmaxable, too.

    undecided: neither is proven.
    """

    index: int
    verdict: str
    witness: np.ndarray | None = None
    margin: float | None = None
    rounding: float | None = None
    twins: tuple[int, ...] = ()
    dominators: dict[int, float] = field(default_factory=dict)
    residual: float | None = None
    surplus: float | None = None


@dataclass(frozen=True)
class Hints:
    """What a search leaves to the next one of a layer: inputs by class, and how often each class excluded others."""

    inputs: Callable[[int], np.ndarray | None]
    popularity: np.ndarray


class Report(Sequence):
    """What ``find_unargmaxable`` found: the sequence of the K verdicts, and their proofs.

    ``verdicts`` is the list of them, ``classes(verdict)`` lists who has one, ``certificate(k)`` proves it.
    """

    def __init__(self, layer: Layer, verdicts: list[str], witnesses, dominators, groups, hints: Hints):
        self.layer, self.verdicts, self.hints = layer, verdicts, hints
        self._witnesses, self._dominators, self._groups = witnesses, dominators, groups
        self._tied: dict[int, tuple[float, float]] = {}  # margin and rounding of a group, by its least class

    def __len__(self) -> int:
        return len(self.verdicts)

    def __getitem__(self, k):
        return self.verdicts[k]

    def __repr__(self) -> str:
        counts = Counter(self.verdicts)
        return f"Report({', '.join(f'{counts[name]} {name}' for name in VERDICTS if counts[name]) or 'no classes'})"

    def classes(self, verdict: str) -> list[int]:
        """The classes with this verdict, ascending."""
        return [k for k, found in enumerate(self.verdicts) if found == verdict]

    def claim(self, k: int) -> Certificate:
        """The proof of class k's verdict without its figures."""
        k = range(len(self))[k]
        verdict, twins = self.verdicts[k], ()
        if verdict in ("argmaxable", "tied"):
            if verdict == "tied":
                twins = self._groups(k)  # one object for all of them, however many there are
            return Certificate(k, verdict, np.asarray(self._witnesses(k), dtype=np.float64), twins=twins)
        if verdict == "unargmaxable":
            classes, values = self._dominators(k)
            return Certificate(k, verdict, dominators=dict(sorted(zip(classes.tolist(), values.tolist()))))
        return Certificate(k, verdict)

    def certificate(self, k: int) -> Certificate:
        """The proof of class k's verdict, with its figures evaluated in float64."""
        return self._with_figures([self.claim(k)])[0]

    def certificates(self) -> Iterator[Certificate]:
        """``certificate(k)`` for every class, faster than one by one."""
        for begin in range(0, len(self), 256):
            yield from self._with_figures([self.claim(k) for k in range(begin, min(begin + 256, len(self)))])

    def _with_figures(self, proofs: list[Certificate]) -> list[Certificate]:
        groups = {}  # a group of equal rows has one witness
        for proof in proofs:
            if proof.witness is not None and _group(proof)[0] not in self._tied:
                groups[_group(proof)[0]] = proof.witness, _group(proof)
        figures = {}
        if groups:
            inputs, members = zip(*groups.values())
            margins = witness_margins(self.layer, np.stack(inputs), members)
            figures = dict(zip(groups, zip(*(figure.tolist() for figure in margins))))
            self._tied |= {group[0]: figures[group[0]] for group in members if len(group) > 1}
        for m, proof in enumerate(proofs):
            if proof.witness is not None:
                first = _group(proof)[0]
                margin, rounding = figures.get(first) or self._tied[first]
                proofs[m] = replace(proof, margin=margin, rounding=rounding)
            if proof.dominators:
                one = np.array([proof.index]), *(array[None] for array in _arrays(proof.dominators))
                residual, surplus = domination(self.layer, *one)[:2, 0].tolist()
                proofs[m] = replace(proof, residual=residual, surplus=surplus)
        return proofs


def _group(proof: Certificate) -> tuple[int, ...]:
    return proof.twins or (proof.index,)


def _arrays(dominators: dict[int, float]) -> tuple[np.ndarray, np.ndarray]:
    return np.array(list(dominators), dtype=np.int64), np.array(list(dominators.values()), dtype=np.float64)


def witness_margins(layer: Layer, x: np.ndarray, groups: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """By how much the least logit of group m exceeds all others for x ``[M, d]``, and a bound of the rounding errors.

    The error of a sum of n products is at most n u / (1 - n u) times the sum of their magnitudes, u = 2^-53 (Higham,
    Accuracy and Stability of Numerical Algorithms, section 3.1). Returned is the pair of least (margin - rounding).
    """
    M, K, d = len(x), len(layer.weight), x.shape[1]
    unit = (d + 4) * 2.0**-53 * 1.01
    own_rows = np.array([group[0] for group in groups])
    own, own_size = _logits(layer, own_rows, x)
    margin, rounding, slack = np.full(M, np.inf), np.zeros(M), np.full(M, np.inf)
    rows = max(1, min(K, _BLOCK // max(M, d)))
    members = [(k, m) for m, group in enumerate(groups) for k in group]
    owners = np.array([k for k, _ in members])
    column = np.array([m for _, m in members])
    for begin in range(0, K, rows):
        weight, bias = layer.rows(slice(begin, begin + rows)), layer.bias[begin : begin + rows]
        gaps = own - (weight @ x.T + bias[:, None])  # [rows, M]
        errors = unit * (own_size + (np.abs(weight) @ np.abs(x).T + np.abs(bias)[:, None]))
        here = (owners >= begin) & (owners < begin + rows)
        gaps[owners[here] - begin, column[here]] = np.inf
        certain = gaps - errors
        least = certain.argmin(0)
        values = certain[least, range(M)]
        better = values < slack
        slack[better] = values[better]
        margin[better], rounding[better] = gaps[least, range(M)][better], errors[least, range(M)][better]
    return margin, rounding


def wins(layer: Layer, x: np.ndarray, groups: Sequence[Sequence[int]]) -> np.ndarray:
    """For which groups the margin is above the rounding errors: first by one bound for all rows, then by each row's."""
    M, K, d = len(x), len(layer.weight), x.shape[1]
    own, _ = _logits(layer, np.array([group[0] for group in groups]), x)
    best, longest = np.full(M, -np.inf), 0.0
    rows = max(1, min(K, _BLOCK // max(M, d)))
    owners = np.array([k for group in groups for k in group])
    column = np.array([m for m, group in enumerate(groups) for _ in group])
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is left to the second bound
        for begin in range(0, K, rows):
            weight = layer.rows(slice(begin, begin + rows))
            logits = weight @ x.T
            logits += layer.bias[begin : begin + rows, None]
            here = (owners >= begin) & (owners < begin + rows)
            logits[owners[here] - begin, column[here]] = -np.inf
            best = np.maximum(best, logits.max(0))
            longest = max(longest, float(np.sqrt(np.square(weight).sum(1).max())))
        size = longest * np.linalg.norm(x, axis=1) + np.abs(layer.bias).max()
        certain = own - best > 2 * (d + 4) * 2.0**-53 * 1.02 * size
    rest = np.flatnonzero(~certain)
    if len(rest):
        margin, rounding = witness_margins(layer, x[rest], [groups[m] for m in rest])
        certain[rest] = margin > rounding
    return certain


def _logits(layer, rows, x):
    weight, bias = layer.rows(rows), layer.bias[rows]
    return np.einsum("md,md->m", weight, x) + bias, np.einsum("md,md->m", np.abs(weight), np.abs(x)) + np.abs(bias)


def domination(layer: Layer, k: np.ndarray, classes: np.ndarray, multipliers: np.ndarray):
    """How far ``multipliers`` of ``classes`` ``[M, S]`` dominate the classes k ``[M]``: four arrays ``[M]``.

    For every allowed x the averaged logit less that of class k is at least surplus - |residual vector . x|: the vector
    sum a_i (w_k - w_i) is paired with the bound that is worst for each of its components, where there is one. Returned
    are the residual, the surplus, and the magnitudes of the weights and of the logits that were added up.
    """
    results = []
    step = max(1, _BLOCK // max(1, classes.shape[1] * layer.weight.shape[1]))
    for begin in range(0, len(k), step):
        who, mix, own = classes[begin : begin + step], multipliers[begin : begin + step], k[begin : begin + step]
        weight, bias = layer.rows(who), layer.bias[who]  # [m, S, d], [m, S]
        row, own_bias = layer.rows(own), layer.bias[own]
        vector = np.einsum("ms,msd->md", mix, row[:, None] - weight)
        size = np.abs(row) + np.einsum("ms,msd->md", mix, np.abs(weight))
        limit = np.where(vector > 0, layer.upper, layer.lower)
        bounded = np.isfinite(limit) & (vector != 0)
        limit = np.where(bounded, limit, 0.0)
        residual = np.abs(np.where(bounded, 0.0, vector)).max(1)
        surplus = np.einsum("ms,ms->m", mix, bias - own_bias[:, None]) - (vector * limit).sum(1)
        logits = np.abs(own_bias) + np.einsum("ms,ms->m", mix, np.abs(bias)) + (size * np.abs(limit)).sum(1)
        results.append(np.stack([residual, surplus, size.max(1), logits]))
    return np.concatenate(results, 1) if results else np.zeros((4, 0))


def rounding_only(layer: Layer, k, classes, multipliers, tolerance: float) -> np.ndarray:
    """Which of these proofs leave nothing but rounding errors: ``[M]``."""
    residual, surplus, weights, logits = domination(layer, k, classes, multipliers)
    return (residual <= tolerance * weights) & (surplus >= -tolerance * logits)


def dominates(layer: Layer, k: int, classes: np.ndarray, multipliers: np.ndarray, tolerance: float) -> str | None:
    """None if the multipliers prove that class k never exceeds the others, or what is wrong with them."""
    if len(classes) == 0 or len(set(classes.tolist())) != len(classes) or k in classes:
        return "the dominating classes are not distinct other classes"
    if not (multipliers >= 0).all() or abs(multipliers.sum() - 1) > 1e-12:
        return "the multipliers are not non-negative numbers of sum one"
    one = np.array([k]), classes[None], multipliers[None]
    residual, surplus, weights, logits = domination(layer, *one)[:, 0].tolist()
    if not residual <= tolerance * weights:
        return f"residual {residual:.3g} is above {tolerance:.3g} of the weights' magnitude {weights:.3g}"
    if not surplus >= -tolerance * logits:
        return f"surplus {surplus:.3g} is below -{tolerance:.3g} of the logits' magnitude {logits:.3g}"
    return None


def verify(weight, bias, report: Report | Iterable[Certificate], *, bound=None, nonnegative=False, lower=None,
           upper=None, tolerance: float = 1e-12) -> list[str]:  # fmt: skip
    """Checks every certificate in float64 from the layer alone, and returns what is wrong: an empty list if nothing is.

    Args as for :func:`find_unargmaxable`; ``report`` is its result or an iterable of certificates. An undecided
    class claims nothing, so nothing can be wrong with it.

    >>> import numpy as np
    >>> from supy.argmax import find_unargmaxable
    >>> weight = np.array([[1.0], [0.0], [-1.0]])
    >>> verify(weight, None, find_unargmaxable(weight))
    []
    """
    from supy.argmax.search import read_layer

    layer = read_layer("argmax.verify", weight, bias, bound, nonnegative, lower, upper)
    K = len(layer.weight)
    claims = (report.claim(k) for k in range(len(report))) if isinstance(report, Report) else report
    problems, seen, won, groups = {}, set(), [], _Groups(layer)

    def check_won():
        inputs, members = np.stack([proof.witness for proof in won]), [_group(proof) for proof in won]
        for m in np.flatnonzero(~wins(layer, inputs, members)):
            margin, rounding = witness_margins(layer, inputs[m : m + 1], members[m : m + 1])
            said = f"it wins by {margin[0]:.3g}, with errors up to {rounding[0]:.3g}"
            for k in (won[m].index, *groups.followers(won[m])):
                problems[k] = f"class {k}: {said}"
        won.clear()

    for proof in claims:
        k = proof.index
        if not 0 <= k < K or k in seen:
            problems[k] = f"class {k}: not a class of this layer, or twice in the report"
            continue
        seen.add(k)
        problem = _check(layer, proof, groups, tolerance)
        if problem:
            problems[k] = f"class {k}: {problem}"
        elif proof.verdict in ("argmaxable", "tied") and not groups.follows(proof):
            won.append(proof)
            if len(won) == 256:
                check_won()
    if won:
        check_won()
    found = list(problems.values())
    return found if len(seen) == K else [*found, f"the report has {len(seen)} classes, the layer {K}"]


class _Groups:
    """Groups of classes with the same row, each checked once, however many of them claim it."""

    def __init__(self, layer: Layer):
        self.layer = layer
        self.known: dict[int, tuple] = {}  # by identity: the tuple, which keeps that its own; its set; what is wrong
        self.leaders: dict[int, tuple[Certificate, list[int]]] = {}  # the first claim of a group, and who has the same

    def problem(self, proof: Certificate) -> str | None:
        twins = proof.twins
        if id(twins) not in self.known:
            self.known[id(twins)] = twins, frozenset(twins), self._problem(twins)
        _, members, problem = self.known[id(twins)]
        return problem if proof.index in members else f"class {proof.index} is not one of its twins"

    def _problem(self, twins: tuple[int, ...]) -> str | None:
        if len(set(twins)) != len(twins) or not all(0 <= k < len(self.layer.weight) for k in twins):
            return "its twins are not distinct classes"
        classes = np.array(twins)
        other = self.layer.bias[classes] != self.layer.bias[classes[0]]
        other |= (self.layer.weight[classes] != self.layer.weight[classes[0]]).any(1)
        return f"class {classes[other][0]} has another row" if other.any() else None

    def follows(self, proof: Certificate) -> bool:
        """Whether an earlier class of its group makes the same claim; else it is the first."""
        if not proof.twins:
            return False
        leader, followers = self.leaders.setdefault(id(proof.twins), (proof, []))
        if leader is proof or not np.array_equal(leader.witness, proof.witness):
            return False
        followers.append(proof.index)
        return True

    def followers(self, proof: Certificate) -> list[int]:
        leader, followers = self.leaders.get(id(proof.twins), (None, []))
        return followers if leader is proof else []


def _check(layer: Layer, proof: Certificate, groups: _Groups, tolerance: float) -> str | None:
    """What is wrong, all but whether a witness wins."""
    k = proof.index
    if proof.verdict == "undecided":
        return None
    if proof.verdict == "unargmaxable":
        classes, multipliers = _arrays(proof.dominators)
        if (classes < 0).any() or (classes >= len(layer.weight)).any():
            return "a dominating class is not a class of this layer"
        return dominates(layer, k, classes, multipliers, tolerance)
    if proof.verdict not in VERDICTS:
        return f"{proof.verdict!r} is not a verdict"
    if proof.witness is None:
        return "it has no witness"
    x = np.asarray(proof.witness, dtype=np.float64)
    if x.shape != layer.lower.shape or not np.isfinite(x).all():
        return f"the witness has shape {list(x.shape)} or is not finite, expected [{layer.weight.shape[1]}]"
    if (x < layer.lower).any() or (x > layer.upper).any():
        return "the witness is outside the bounds"
    if (proof.verdict == "tied") != (len(proof.twins) > 1):
        return "exactly a tied class has twins, the classes with the same row"
    return groups.problem(proof) if proof.twins else None
