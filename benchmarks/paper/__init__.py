"""The paper's claims as an acceptance run, and what its readers missed.

``python -m benchmarks.paper`` trains small networks on noisy real digits, sweeps them through
lsweep and prints for each claim of Li et al. (NeurIPS 2018) whether it reproduces.
``python -m benchmarks.paper --beyond`` does so for architectures and losses that it does not have.
"""
