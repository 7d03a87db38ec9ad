"""Amortised inference: bounds, Markov kernels, encoders and certified evaluation.

The package is small and functional. Densities enter algorithms as callables, samples and chains
come first (``[K, B, D]``), log-probabilities are in nats, and nothing here seeds a generator or
moves a tensor to another device by itself.
"""

__version__ = "0.1.0"
