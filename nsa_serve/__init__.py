"""nsa-serve: an inference serving engine for Native Sparse Attention (arXiv 2502.11089)."""

__version__ = "0.1.0"
