"""A small real language model, SmolLM2-135M, to measure on it what int4 costs. README.md names every file."""
