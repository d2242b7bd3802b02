"""Noise schedule, samplers, guidance."""
