"""The schedulers for diffusers against diffusers' own, and in its pipelines."""

import importlib
import sys

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_ddim, scheduling_ddpm

from supy import diffusion
from supy.diffusion import Schedule
from supy.ops import philox_normal

SHAPE = 2, 3, 8, 8
SEED = 11

DDPM = [
    {},
    {"clip_sample": False},
    {"clip_sample_range": 0.5},
    {"variance_type": "fixed_large"},
    {"variance_type": "fixed_small_log"},
    {"variance_type": "learned_range"},
    {"variance_type": "learned"},
    {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9},
    {"prediction_type": "sample"},
    {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"},
    {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1},
    {"timestep_spacing": "linspace"},
    {"timestep_spacing": "trailing", "beta_schedule": "squaredcos_cap_v2"},
    {"num_train_timesteps": 4, "trained_betas": [0.1, 0.2, 0.3, 0.4], "clip_sample": False},
]
DDIM = [
    {},
    {"clip_sample": False},
    {"set_alpha_to_one": False, "steps_offset": 1, "beta_schedule": "scaled_linear", "clip_sample": False},
    {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9},
    {"prediction_type": "sample"},
    {"prediction_type": "v_prediction", "clip_sample": False},
    {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    {"timestep_spacing": "linspace", "beta_schedule": "squaredcos_cap_v2"},
    {"clip_sample_range": 2.0, "timestep_spacing": "trailing"},
]


def named(configs):
    return [",".join(f"{k}={v}" for k, v in config.items()) or "default" for config in configs]


def same_noise(monkeypatch):
    """diffusers draws its noise as supy does: a seed from the generator, and the Philox stream of it."""

    def randn_tensor(shape, generator=None, device=None, dtype=None, layout=None):
        seed = torch.randint(2**63 - 1, (), generator=generator).item()
        return philox_normal(shape, seed, dtype=dtype)

    for module in (scheduling_ddim, scheduling_ddpm):
        monkeypatch.setattr(module, "randn_tensor", randn_tensor)


def precise(scheduler):
    """diffusers' own formulas, with coefficients in float64.

    In float32, the beta of a jump, 1 - alphas_cumprod[t] / alphas_cumprod[before], has a rounding error of 6e-8, which
    is 5e-4 of it at t = 1, and DDIM's 1 - alphas_cumprod[before] - sigma^2 is rounding only where alphas_cumprod[t] is
    2e-9.
    """
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    return scheduler


def compare(ours, theirs, channels=3, **options):
    """Every step from the same x, so that differences do not add up."""
    steps = min(10, ours.config.num_train_timesteps)
    generators = [torch.Generator().manual_seed(SEED) for _ in range(2)]
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(steps)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    x = philox_normal(SHAPE, 1)
    for t in theirs.timesteps:
        output = philox_normal((2, channels, 8, 8), 2, offset=1000 * int(t))
        if theirs.config.get("variance_type") == "learned":
            output[:, 3:] = output[:, 3:].abs()  # variances
        got, expected = (
            scheduler.step(output, t, x, generator=generator, **options)
            for scheduler, generator in zip((ours, theirs), generators)
        )
        for name in ("prev_sample", "pred_original_sample"):
            wanted = expected[name]
            # Relative to the largest value, since without clipping x_0 is x / alpha_bar, up to 150.
            atol = 1e-5 * max(1.0, wanted.abs().max().item())
            torch.testing.assert_close(got[name], wanted, rtol=0, atol=atol)
        x = expected.prev_sample.clamp(-3, 3)


@pytest.mark.parametrize("config", DDPM, ids=named(DDPM))
def test_ddpm_equals_diffusers(config, monkeypatch):
    same_noise(monkeypatch)
    channels = 6 if config.get("variance_type", "").startswith("learned") else 3
    compare(diffusion.DDPMScheduler(**config), diffusers.DDPMScheduler(**config), channels)


@pytest.mark.parametrize("options", [{}, {"eta": 0.7}, {"eta": 1.0, "use_clipped_model_output": True}], ids=str)
@pytest.mark.parametrize("config", DDIM, ids=named(DDIM))
def test_ddim_equals_diffusers(config, options, monkeypatch):
    same_noise(monkeypatch)
    theirs = diffusers.DDIMScheduler(**config)
    if config.get("beta_schedule") == "squaredcos_cap_v2":
        precise(theirs)
    if config.get("rescale_betas_zero_snr") and options.get("eta") == 1.0:
        options = {**options, "eta": 0.99}  # at 1 the root of what should be 0 is NaN in diffusers
    compare(diffusion.DDIMScheduler(**config), theirs, **options)


def test_given_noise():
    """``variance_noise``, without anything patched."""
    x, output, noise = (philox_normal(SHAPE, seed) for seed in (1, 2, 3))
    results = []
    for module in (diffusion, diffusers):
        scheduler = module.DDIMScheduler()
        scheduler.set_timesteps(20)
        results.append(scheduler.step(output, 500, x, eta=1.0, variance_noise=noise, return_dict=False))
        with pytest.raises(ValueError, match="generator"):
            scheduler.step(output, 500, x, eta=1.0, variance_noise=noise, generator=torch.Generator())
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_all_training_steps(monkeypatch):
    """Without set_timesteps, DDPM's steps are those of training; and custom timesteps work."""
    same_noise(monkeypatch)
    for timesteps in (None, [900, 20, 3]):
        pair = diffusion.DDPMScheduler(), precise(diffusers.DDPMScheduler())
        for scheduler in pair:
            if timesteps:
                scheduler.set_timesteps(timesteps=timesteps)
        for t in timesteps or (999, 1, 0):
            results = []
            for scheduler in pair:
                generator = torch.Generator().manual_seed(SEED)
                args = philox_normal(SHAPE, 2), t, philox_normal(SHAPE, 1)
                results.append(scheduler.step(*args, generator=generator).prev_sample)
            torch.testing.assert_close(*results, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_add_noise_and_velocity(name):
    x0, noise = philox_normal(SHAPE, 1), philox_normal(SHAPE, 2)
    ours, theirs = (getattr(module, name)(beta_schedule="squaredcos_cap_v2") for module in (diffusion, diffusers))
    for t in (torch.tensor([0, 999]), torch.tensor([500]), torch.tensor(3)):
        torch.testing.assert_close(ours.add_noise(x0, noise, t), theirs.add_noise(x0, noise, t), rtol=0, atol=1e-6)
    t = torch.tensor([7, 700])
    torch.testing.assert_close(ours.get_velocity(x0, noise, t), theirs.get_velocity(x0, noise, t))
    half = ours.add_noise(x0.bfloat16(), noise, torch.tensor([10, 20]))
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_config_and_files(name, tmp_path):
    ours = getattr(diffusion, name)
    theirs = getattr(diffusers, name)(beta_end=0.01, prediction_type="sample", timestep_spacing="trailing")
    scheduler = ours.from_config(theirs.config)
    assert isinstance(scheduler, ours)
    assert scheduler.config.beta_end == 0.01 and scheduler.config.prediction_type == "sample"
    scheduler.save_pretrained(tmp_path)
    for cls in (ours, type(theirs)):  # each reads the other's file
        again = cls.from_pretrained(tmp_path)
        assert type(again) is cls and again.config.timestep_spacing == "trailing"
    x = philox_normal(SHAPE, 1)
    assert scheduler.scale_model_input(x, 3) is x
    assert scheduler.init_noise_sigma == 1.0 and scheduler.order == 1 and len(scheduler) == 1000
    assert len(scheduler.timesteps) == 1000


def test_from_schedule():
    schedule = Schedule.cosine(50)
    scheduler = diffusion.DDPMScheduler.from_schedule(schedule, prediction_type="sample")
    # diffusers keeps betas in float32, and multiplies 50 of them
    np.testing.assert_allclose(scheduler.alphas_cumprod.sqrt(), schedule.alpha_bar[1:], rtol=2e-5)
    assert scheduler.config.prediction_type == "sample" and len(scheduler) == 50


def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        layers_per_block=1,
    ).eval()


def run(pipeline, generator=None, **options):
    pipeline.set_progress_bar_config(disable=True)
    generator = generator or torch.Generator().manual_seed(SEED)
    return torch.from_numpy(pipeline(2, generator=generator, output_type="np", num_inference_steps=5, **options).images)


def test_ddpm_pipeline(monkeypatch, tmp_path):
    same_noise(monkeypatch)
    model = unet()
    pipeline = diffusers.DDPMPipeline(model, diffusion.DDPMScheduler())
    images = run(pipeline)
    torch.testing.assert_close(images, run(diffusers.DDPMPipeline(model, diffusers.DDPMScheduler())), rtol=0, atol=1e-5)
    pipeline.save_pretrained(tmp_path)
    again = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    assert isinstance(again.scheduler, diffusion.DDPMScheduler) and torch.equal(run(again), images)


@pytest.mark.parametrize("options", [{}, {"eta": 0.5, "use_clipped_model_output": True}], ids=str)
def test_ddim_pipeline(options, monkeypatch):
    same_noise(monkeypatch)
    pipeline = diffusers.DDIMPipeline(unet(), diffusers.DDIMScheduler())
    expected = run(pipeline, **options)
    pipeline.scheduler = diffusion.DDIMScheduler.from_config(pipeline.scheduler.config)
    torch.testing.assert_close(run(pipeline, **options), expected, rtol=0, atol=1e-5)


def test_a_generator_for_each_picture():
    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    pipeline = diffusers.DDPMPipeline(unet(), diffusion.DDPMScheduler())
    both, swapped = run(pipeline, generators(1, 2)), run(pipeline, generators(2, 1))
    torch.testing.assert_close(both, swapped.flip(0), rtol=0, atol=1e-6)
    x = philox_normal(SHAPE, 1)
    with pytest.raises(ValueError, match="got 3 generators, expected 2"):
        diffusion.DDPMScheduler().step(x, 10, x, generator=generators(1, 2, 3))


def test_what_is_refused():
    x = philox_normal(SHAPE, 1)
    with pytest.raises(ValueError, match="set_timesteps was not called"):
        diffusion.DDIMScheduler().step(x, 10, x)
    with pytest.raises(ValueError, match="prediction_type is 'noise'"):
        diffusion.DDPMScheduler(prediction_type="noise").step(x, 10, x)


def test_without_diffusers(monkeypatch):
    monkeypatch.delitem(sys.modules, "supy.diffusion.diffusers_schedulers")
    monkeypatch.delattr(diffusion, "diffusers_schedulers")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    importlib.reload(diffusion)
    with pytest.raises(ImportError, match=r"DDPMScheduler needs diffusers: pip install supy\[diffusers\]"):
        diffusion.DDPMScheduler
    with pytest.raises(AttributeError, match="Euler"):
        diffusion.EulerScheduler
