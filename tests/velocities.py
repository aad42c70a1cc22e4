"""Velocities of which much is known, and a trajectory of one of them."""

import torch

from flow_grpo import rollout, time_grid


def linear_velocity(weight):
    """v = x @ weight * (1 + t), over the flattened entries of a sample."""
    def velocity(x, t):
        return (x.flatten(1) @ weight).view_as(x) * (1 + t)
    return velocity


def exact_velocity(mean, std):
    """Velocity of data Normal(mean, std): E[noise - data | x]."""
    def velocity(x, t):
        variance = ((1 - t) * std) ** 2 + t**2
        return (t - (1 - t) * std**2) / variance * (x - (1 - t) * mean) - mean
    return velocity


def sample_linear(sampler="sde", *, N=6, W=3, dtype=torch.float32, density="mean"):
    """A trajectory of 2 x 2 latents with W noisy steps under a linear velocity; its weight; another."""
    weight, change = torch.randn(2, 4, 4, dtype=dtype) / 2
    noise, step_noise = torch.randn(N, 2, 2, dtype=dtype), torch.randn(W, N, 2, 2, dtype=dtype)
    old = rollout(
        linear_velocity(weight), noise, time_grid(8, 2.0), window=(1, 1 + W), noise_level=0.7,
        sampler=sampler, step_noise=step_noise, density=density)
    return old, weight, weight + 0.1 * change
