"""Diffusion sampling over rows: pictures in the making, each at its own noise level. Imports torch alone."""
