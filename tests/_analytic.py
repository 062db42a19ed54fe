"""Data whose best network is known: normal distributions and mixtures of them, each pixel by itself."""

import numpy as np
import torch

from supy.diffusion import Schedule


class Mixture:
    """A network that returns the exact expectation of what it should predict, where pixels are a mixture of normals."""

    def __init__(self, schedule: Schedule, weights, means, deviations, prediction: str = "eps"):
        self.schedule, self.prediction = schedule, prediction
        self.weights, self.means, self.deviations = (np.array(v, float) for v in (weights, means, deviations))
        self.calls = []

    @property
    def mean(self) -> float:
        return float((self.weights * self.means).sum())

    @property
    def variance(self) -> float:
        return float((self.weights * (self.deviations**2 + self.means**2)).sum() - self.mean**2)

    def draw(self, shape, seed: int = 0) -> torch.Tensor:
        random = np.random.default_rng(seed)
        part = random.choice(len(self.weights), shape, p=self.weights)
        return torch.tensor(self.means[part] + self.deviations[part] * random.standard_normal(shape)).float()

    def x0(self, x: torch.Tensor, signal: float, noise: float) -> torch.Tensor:
        """E[x_0 | x], in the dtype of x."""
        x = x[..., None]
        parts = self.weights, self.means, self.deviations
        weights, means, deviations = (torch.from_numpy(part).to(x.dtype) for part in parts)
        spread = signal**2 * deviations**2 + noise**2
        share = (weights.log() - 0.5 * spread.log() - 0.5 * (x - signal * means) ** 2 / spread).softmax(-1)
        return (share * (means + signal * deviations**2 / spread * (x - signal * means))).sum(-1)

    def __call__(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        assert t.dtype == torch.int64 and t.shape == (len(x),) and (t == t[0]).all()
        self.calls.append(t[0].item())
        step = t[0].item() + 1
        signal, noise = self.schedule.alpha_bar[step].item(), self.schedule.beta_bar[step].item()
        x0 = self.x0(x, signal, noise)
        if self.prediction == "x0":
            return x0
        return (x - signal * x0) / noise if self.prediction == "eps" else (signal * x - x0) / noise


def coefficients(alpha_bar: np.ndarray, k: int, method: str, sigma: str, eta: float) -> tuple[float, float, float]:
    """(a, c, sigma) of x_{k-1} = a x_k - c eps + sigma z as the posts write them, from alpha_bar_0 to alpha_bar_K."""
    signal, before = alpha_bar[k], alpha_bar[k - 1]
    noise, noise_before = np.sqrt(1 - signal**2), np.sqrt(1 - before**2)
    alpha = signal / before
    beta = np.sqrt(1 - alpha**2)
    b = beta * noise_before / noise
    if method == "ddpm":  # post 9152
        return 1 / alpha, beta**2 / noise / alpha, {"posterior": b, "beta": beta, "zero": 0.0}[sigma]
    s = eta * b  # post 9181
    return 1 / alpha, (noise - alpha * np.sqrt(max(noise_before**2 - s**2, 0.0))) / alpha, s


def with_analytic(alpha_bar: np.ndarray, k: int, c: float, sigma: float, factor: float) -> float:
    """sigma^2 + gamma^2 factor, gamma = c alpha alpha_bar_{k-1} / alpha_bar_k (the code of post 9245)."""
    alpha = alpha_bar[k] / alpha_bar[k - 1]
    return np.sqrt(sigma**2 + (c * alpha * alpha_bar[k - 1] / alpha_bar[k]) ** 2 * factor)
