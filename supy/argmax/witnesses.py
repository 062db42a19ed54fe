"""Inputs for which most classes win, found by matrix products with a proven bound of their rounding errors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from supy import _extension
from supy.ops import linear_argmax

_CHUNK = {"cpu": 1 << 22, "cuda": 1 << 26}  # numbers of directions that are held at once
_HALF_FROM = 64  # columns from which the first product is one of bfloat16
NONE, ROW, ROUNDED_ROW, STORED = range(4)  # which input a class has: none, its row, that in bfloat16, another one


class EasyWitnesses:
    """Which of the distinct rows have a witness (``found``), and how often each was in the way of another.

    ``get`` is a row's witness in the scaled problem: its row less the mean, which is computed again, or a stored input.
    """

    def __init__(self, problem):
        self.problem = problem
        self.rows, self.columns = len(problem.first), problem.layer.weight.shape[1]
        self.kind, self.stored = np.zeros(self.rows, np.int8), {}
        self.popularity, self.mean = np.zeros(self.rows, np.int64), torch.zeros(self.columns, dtype=torch.float64)
        self.low, self.high = _inward(problem.lower, problem.upper)

    @property
    def found(self) -> np.ndarray:
        return self.kind != NONE

    def search(self, source: torch.Tensor | None, previous: Callable, bar) -> None:
        """``source``: the weight on another device, or None; ``previous(row)``: an input to try first, or None."""
        if self.rows < 2 or (self.low > self.high).any():
            return
        _Filter(self, source, bar).search(previous)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that a later process needs to go on."""
        rows = np.array(list(self.stored), dtype=np.int64)
        inputs = np.zeros((len(rows), self.columns), np.float32)
        for to, x in zip(inputs, self.stored.values()):
            to[:] = x
        arrays = {"kind": self.kind, "rows": rows, "inputs": inputs}
        return {name: torch.from_numpy(array) for name, array in arrays.items()} | {"mean": self.mean}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        self.kind, self.mean = tensors["kind"].numpy(), tensors["mean"]
        self.stored = dict(zip(tensors["rows"].tolist(), tensors["inputs"].numpy()))

    def get(self, row: int) -> np.ndarray:
        if self.kind[row] == STORED:
            return self.stored[row]
        x = (torch.from_numpy(self.problem.scaled([row])) - self.mean).float()
        x = x.bfloat16().float() if self.kind[row] == ROUNDED_ROW else x
        return x.clamp(self.low, self.high)[0].numpy()


class _Filter:
    """The distinct rows on a device, the longest first, less their mean, which changes all logits of an input alike."""

    def __init__(self, to: EasyWitnesses, source: torch.Tensor | None, bar):
        self.to, self.problem, self.source, self.bar = to, to.problem, source, bar
        self.device = torch.device("cpu") if source is None else source.device
        self.low, self.high = to.low.to(self.device), to.high.to(self.device)
        K, d, problem = to.rows, to.columns, to.problem
        self.rows, self.columns = K, d
        step = max(1, self._step() // 4)  # in float64
        parts = [range(at, min(at + step, K)) for at in range(0, K, step)]
        total = sum(self._scaled(np.asarray(part)).sum(0) for part in parts)
        self.mean = (total / K).float().double()
        to.mean = self.mean.cpu()
        lengths = torch.cat([_lengths(self._centred(np.asarray(part))) for part in parts])
        self.order = lengths.argsort(descending=True, stable=True).cpu().numpy()
        self.weight = torch.empty(K, d, device=self.device)
        for part in parts:
            self.weight[part.start : part.stop] = self._centred(self.order[part.start : part.stop])
        self.bias, self.highest = None, float(np.abs(problem.bias).max())
        if self.highest > 0:
            self.bias = torch.from_numpy(problem.bias[self.order]).float().to(self.device)
        self.longest = 1.001 * float(lengths.max())
        self.unit = (d + 8) * 2.0**-23  # rounding of the rows and of the product, twice what the analysis asks for
        self.half = None
        cuda = self.device.type == "cuda"
        if cuda:  # three products of tf32 leave out less than 2^-18, one less than 2^-8
            self.unit += 2.0**-8 if torch.backends.cuda.matmul.fp32_precision == "tf32" else 2.0**-18
        fast = cuda or (_extension.C is not None and _extension.C.build_info()["bf16_products"])
        self.unbounded = not np.isfinite(problem.lower).any() and not np.isfinite(problem.upper).any()
        if fast and self.unbounded and d >= _HALF_FROM:
            self.half = self.weight.bfloat16()
            spans = (slice(part.start, part.stop) for part in parts)
            self.lost = 1.001 * max(float(_lengths(self.weight[s] - self.half[s]).max()) for s in spans)
        self.won = torch.zeros(K, dtype=torch.bool, device=self.device)
        self.beaten = torch.zeros(K, dtype=torch.int64, device=self.device)

    def _step(self) -> int:
        return max(1024, _CHUNK[self.device.type] // self.columns)

    def _scaled(self, rows: np.ndarray) -> torch.Tensor:
        if self.source is None:
            return torch.from_numpy(self.problem.scaled(rows))
        index = torch.from_numpy(self.problem.first[rows]).to(self.device)
        return self.source[index].double() / self.problem.size

    def _centred(self, rows: np.ndarray) -> torch.Tensor:
        return (self._scaled(rows) - self.mean).float()

    def attempt(self, k: torch.Tensor, direction: Callable[[slice], torch.Tensor], own: bool = False) -> torch.Tensor:
        """Which row wins instead of each of ``k`` for the inputs ``direction(part)``; 0 where k itself does."""
        rival = torch.zeros_like(k)
        for begin in range(0, len(k), self._step()):
            part = slice(begin, begin + self._step())
            x, at = direction(part), torch.arange(begin, min(begin + self._step(), len(k)), device=self.device)
            if self.half is not None:
                unsure = self._compare(k, rival, at, x.bfloat16(), self.half, self.lost, ROUNDED_ROW if own else STORED)
                x, at = x[unsure], at[unsure]
            if len(at):
                self._compare(k, rival, at, x, self.weight, 0.0, ROW if own else STORED)
        lost = rival[~self.won[k]]
        self.beaten.index_add_(0, lost, torch.ones_like(lost))
        return rival

    def _compare(self, k, rival, at, x, weight, lost: float, kind: int) -> torch.Tensor:
        """Finds the winners for x `[len(at), d]`, and returns which of them rounding leaves open.

        A logit in ``weight`` is off by at most |x| times ``lost``, what its rounding took from a row, and
        by ``unit`` of the magnitudes that were added up; the factor 4 is for sums of products of bfloat16 in hardware.
        """
        k, wide = k[at], x.float()
        length = _lengths(wide)
        own = (wide * self.weight[k]).sum(1).double()
        own = own if self.bias is None else own + self.bias[k]
        unit = self.unit if lost == 0 else 4 * (self.columns + 8) * 2.0**-23
        bound = lost * length + 2 * unit * (self.longest * length + self.highest) + self.problem.blur
        bound += self.columns * 2.0**-120  # numbers below the normal ones are taken as 0
        value, best = linear_argmax(x, weight, self.bias, exclude=k, floor=(own - bound).float())
        won = best < 0
        rival[at] = best.clamp(min=0)
        self.won[k[won]] = True
        rows = self.order[k[won].cpu().numpy()]
        self.to.kind[rows] = kind
        if kind == STORED:
            self.to.stored.update(zip(rows.tolist(), wide[won].cpu().numpy()))
        self.bar.update(len(rows))
        return ~won & (value.double() <= own + bound)

    # --- the directions ----------------------------------------------------------------------------------------------

    def search(self, previous: Callable) -> None:
        """A row less the mean, what won before, its product with the inverse covariance, each at several lengths; then
        reflections at the boundary to whatever class wins (arXiv 2203.06462, section 3.2), and ascent on the margin."""
        K, n, weight = self.rows, self.columns + 1, self.weight
        # A pass must win this share of its classes to be cheaper than deciding those exactly (operations, as measured).
        worthwhile = 0.7 * K * (2 * n + 25) / (54 * n**3 + K * (5 * n + 60))

        def remaining() -> torch.Tensor:
            return torch.nonzero(~self.won)[:, 0]

        def sample_of(left: torch.Tensor) -> torch.Tensor:
            return left[:: max(1, len(left) // 256)]

        def cut(x: torch.Tensor) -> torch.Tensor:
            return x.clamp(self.low, self.high)

        inverse = None

        def whitened(k: torch.Tensor) -> torch.Tensor:
            nonlocal inverse
            if inverse is None:
                inverse = self._inverse_covariance()
            return weight[k] @ inverse

        directions = [(1, None), (10, whitened)]
        if self.bias is not None or not self.unbounded:
            directions = [(1, None), (10, None), (10, whitened), (100, whitened)]  # only then lengths make a difference
        start = None
        for factor, make in directions:

            def direction(k: torch.Tensor, factor=factor, make=make) -> torch.Tensor:
                return cut(factor * (weight[k] if make is None else make(k)))

            own = make is None and factor == 1
            sample = sample_of(remaining())
            self.attempt(sample, lambda part: direction(sample[part]), own)
            if self.won[sample].sum() >= worthwhile * len(sample):
                left = remaining()
                self.attempt(left, lambda part: direction(left[part]), own)
                start = direction
            if own:
                self._attempt_previous(remaining(), previous, cut)

        def reflected(at: torch.Tensor, k: torch.Tensor, rival: torch.Tensor) -> torch.Tensor:
            """The mirror image of each input at the boundary between its class and the one that wins."""
            normal = weight[k] - weight[rival]
            height = (normal * at).sum(1)
            if self.bias is not None:
                height += self.bias[k] - self.bias[rival]
            return cut(at - (2 * height / normal.square().sum(1).clamp(min=1e-30))[:, None] * normal)

        def nearer(at: torch.Tensor, k: torch.Tensor, rival: torch.Tensor) -> torch.Tensor:
            """The point nearest to 0 on the way to w_k - w_rival: ascent on the margin, as Frank and Wolfe do it."""
            way = weight[k] - weight[rival] - at
            share = -(at * way).sum(1) / way.square().sum(1).clamp(min=1e-30)
            return at + share.clamp(0, 1)[:, None] * way

        def walk(k: torch.Tensor, at: torch.Tensor, step: Callable, most: int, every: int, least: float) -> None:
            """Attempts one input after the other, while ``every`` steps win the share ``least`` of what is left."""
            rival, won = self.attempt(k, lambda part: at[part]), 0
            for done in range(1, most + 1):
                keep = ~self.won[k]
                k, at, rival = k[keep], at[keep], rival[keep]
                if len(k) == 0:
                    return
                at = step(at, k, rival)
                rival = self.attempt(k, lambda part: at[part])
                won += int(self.won[k].sum())
                if done % every == 0:
                    if won < least * len(k):
                        return
                    won = 0

        def from_last(k: torch.Tensor) -> torch.Tensor:
            return cut(weight[k]) if start is None else start(k)

        # Where exact decisions are dear, ascent takes over from reflections once these get slow.
        ascends = self.bias is None and self.unbounded and worthwhile < 0.05
        sample, least = sample_of(remaining()), 0.5 * worthwhile
        walk(sample, from_last(sample), reflected, 2, 1, least)
        if len(sample) and self.won[sample].sum() >= worthwhile * len(sample):
            left = remaining()
            walk(left, from_last(left), reflected, 30, 1, 0.05 if ascends else least)
            if ascends:
                left = remaining()  # a row less the mean of all is the average of its differences to the others
                walk(left, weight[left], nearer, 200, 8, 8 * least)
        self.to.popularity[self.order] += self.beaten.cpu().numpy()

    def _attempt_previous(self, left: torch.Tensor, previous: Callable, cut: Callable) -> None:
        inputs = [(k, previous(row)) for k, row in zip(left.tolist(), self.order[left.cpu().numpy()].tolist())]
        inputs = [(k, x) for k, x in inputs if x is not None]
        if inputs:
            k = torch.tensor([k for k, _ in inputs], device=self.device)
            x = cut(torch.from_numpy(np.stack([x for _, x in inputs])).float().to(self.device))
            self.attempt(k, lambda part: x[part])

    def _inverse_covariance(self) -> torch.Tensor:
        spread = (self.weight.T @ self.weight).double() / self.rows
        ridge = 1e-9 * abs(float(spread.trace())) / self.columns + 1e-300
        inverse = torch.linalg.inv_ex(spread + ridge * torch.eye(self.columns).to(spread))[0]
        return (inverse / inverse.norm() * self.columns**0.5).float()


def _lengths(x: torch.Tensor) -> torch.Tensor:
    """In float64, where nothing is too small to be squared."""
    return torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)


def _inward(lower: np.ndarray, upper: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 bounds that imply the given ones."""
    low, high = lower.astype(np.float32), upper.astype(np.float32)
    low = np.where(low < lower, np.nextafter(low, np.float32(np.inf)), low)
    high = np.where(high > upper, np.nextafter(high, np.float32(-np.inf)), high)
    return torch.from_numpy(low), torch.from_numpy(high)
