"""The steps of a diffusion in float64, term by term, as the posts have them: what the operators must give."""

import torch


def along(value, x):
    """A number, or one a sample, as a factor of x."""
    value = torch.as_tensor(value, dtype=torch.float64)
    return value.view(-1, *(1,) * (x.ndim - 1)) if value.ndim else value


def clipped(x0, clip, threshold):
    if threshold is None:
        return x0 if clip is None else x0.clamp(-clip, clip)
    clip = 1.0 if clip is None else clip
    bound = torch.quantile(x0.detach().abs().flatten(1), threshold, dim=1).clamp(min=clip)
    bound = along(bound, x0)
    return torch.where(x0 > bound, bound, torch.where(x0 < -bound, -bound, x0)) * (clip / bound)


def add_noise(x0, alpha_bar, beta_bar, noise):
    return along(alpha_bar, x0) * x0 + along(beta_bar, x0) * noise


def ddpm(x, eps, alpha, beta, beta_bar, sigma, noise=None, clip=None, threshold=None):
    alpha, beta, beta_bar, sigma = (along(value, x) for value in (alpha, beta, beta_bar, sigma))
    if clip is not None or threshold is not None:
        alpha_bar = (1 - beta_bar**2).sqrt()
        x0 = clipped((x - beta_bar * eps) / alpha_bar, clip, threshold)
        eps = (x - alpha_bar * x0) / beta_bar
    mean = (x - beta**2 / beta_bar * eps) / alpha
    return mean if noise is None else mean + sigma * noise


def ddim(x, eps, alpha_bar, alpha_bar_prev, eta=0.0, noise=None, clip=None, threshold=None):
    now, previous, eta = (along(value, x) for value in (alpha_bar, alpha_bar_prev, eta))
    alpha = now / previous
    beta_bar, beta_bar_prev, beta = ((1 - a**2).sqrt() for a in (now, previous, alpha))
    sigma = eta * beta_bar_prev * beta / beta_bar
    if clip is not None or threshold is not None:
        x0 = clipped((x - beta_bar * eps) / now, clip, threshold)
        eps = (x - now * x0) / beta_bar
    mean = (x - (beta_bar - alpha * (beta_bar_prev**2 - sigma**2).sqrt()) * eps) / alpha
    return mean if noise is None else mean + sigma * noise
