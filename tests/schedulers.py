"""The schedulers of diffusers by the names of our samplers."""

from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

SCHEDULERS = {"dpm": CogVideoXDPMScheduler, "ddim": CogVideoXDDIMScheduler}
