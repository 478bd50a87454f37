"""Diffusion: noise schedules, samplers, training of the noise predictor, and models as files."""
