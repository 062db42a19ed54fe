"""The steps of a diffusion beside how they are written elsewhere; step 500 of 1000 of the linear schedule."""

from __future__ import annotations

import functools

import torch

import supy

T, SEED = 500, 7


def complement(a):
    return (1 - a * a) ** 0.5


SQUARES = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
ALPHA_BAR, BETA_BAR = SQUARES.sqrt(), (1 - SQUARES).sqrt()
NOW, PREVIOUS = ALPHA_BAR[T].item(), ALPHA_BAR[T - 1].item()
BETA = complement(NOW / PREVIOUS)  # alpha^2 + beta^2 = 1


def inputs(batch):
    generator = torch.Generator().manual_seed(0)
    x, eps, noise = (torch.randn(batch, 3, 128, 128, generator=generator) for _ in range(3))
    return x, eps, noise, torch.full((batch,), T)


# --- ddpm_step, with noise and with x0 clipped ------------------------------------------------------------------------


def ddpm(x, eps, noise, t, out=None):
    now, previous, beta = NOW, PREVIOUS, BETA
    bar, before = complement(now), complement(previous)
    return supy.ops.ddpm_step(x, eps, now / previous, beta, bar, before * beta / bar, seed=SEED, clip=1.0, out=out)


def ddpm_in_place(x, eps, noise, t):
    return ddpm(x, eps, noise, t, out=noise)  # written over what nobody needs, for x is the next function's too


def ddpm_exact(x, eps, noise, t):
    with supy.use_backend("reference"):
        return ddpm(x, eps, noise, t)


def _posterior():
    now, previous, beta = NOW, PREVIOUS, BETA
    share = beta**2 / complement(now) ** 2
    return now, complement(now), previous * share, now / previous * complement(previous) ** 2 / complement(now) ** 2


def ddpm_by_posterior(x, eps, noise, t):
    """As denoising-diffusion-pytorch, whose package needs torchvision: x0, its posterior's mean, and randn_like."""
    now, bar, of_x0, of_x = _posterior()
    x0 = (x / now - bar / now * eps).clamp_(-1.0, 1.0)
    return of_x0 * x0 + of_x * x + complement(PREVIOUS) * BETA / bar * torch.randn_like(x)


@functools.cache
def _buffers(shape, device):
    return torch.zeros(shape, device=device), torch.empty(shape, device=device)


def ddpm_by_hand(x, eps, noise, t):
    """The fewest calls of PyTorch, without clipping: three in place, one of them making the noise."""
    now, previous, beta = NOW, PREVIOUS, BETA
    state, z = _buffers(x.shape, x.device)
    alpha = now / previous
    return state.mul_(1 / alpha).add_(eps, alpha=-(beta**2) / (complement(now) * alpha)).add_(z.normal_(), alpha=beta)


@functools.cache
def _diffusers(name, **options):
    import diffusers

    return getattr(diffusers, name)(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, **options)


def diffusers_ddpm(x, eps, noise, t):
    return _diffusers("DDPMScheduler", clip_sample=True).step(eps, T, x).prev_sample


# --- ddim_step, eta = 0 -----------------------------------------------------------------------------------------------


def ddim(x, eps, noise, t):
    return supy.ops.ddim_step(x, eps, NOW, PREVIOUS)


def ddim_plain(x, eps, noise, t):
    return PREVIOUS / NOW * (x - complement(NOW) * eps) + complement(PREVIOUS) * eps


def diffusers_ddim(x, eps, noise, t):
    scheduler = _diffusers("DDIMScheduler", clip_sample=False)
    if scheduler.num_inference_steps is None:
        scheduler.set_timesteps(1000)  # so that the step before T is T - 1
    return scheduler.step(eps, T, x).prev_sample


# --- ddpm_add_noise, noise given --------------------------------------------------------------------------------------


@functools.cache
def _tables(device):
    return ALPHA_BAR.to(device), BETA_BAR.to(device)


def add_noise(x, eps, noise, t):
    alpha_bar, beta_bar = _tables(x.device)
    return supy.ops.ddpm_add_noise(x, alpha_bar[t], beta_bar[t], noise=noise)[0]


def add_noise_plain(x, eps, noise, t):
    """As denoising-diffusion-pytorch's q_sample."""
    alpha_bar, beta_bar = (table.gather(0, t).to(x.dtype).view(-1, 1, 1, 1) for table in _tables(x.device))
    return alpha_bar * x + beta_bar * noise


def diffusers_add_noise(x, eps, noise, t):
    return _diffusers("DDPMScheduler", clip_sample=True).add_noise(x, noise, t)
