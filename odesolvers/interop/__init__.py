"""Solvers where other programs call the sampler: `interop.k_diffusion` and `interop.comfyui`."""
