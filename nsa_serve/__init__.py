"""nsa-serve: an inference serving engine for Native Sparse Attention (arXiv 2502.11089)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import EngineConfig
    from .llm import LLM, RequestResult
    from .request import GrammarKind, GrammarSpec, SamplingParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "EngineConfig",
    "GrammarKind",
    "GrammarSpec",
    "RequestResult",
    "SamplingParams",
    "__version__",
]

# Looked up on first use, so that a plain import stays light: the engine brings torch.
_PUBLIC = {
    "EngineConfig": ".config",
    "GrammarKind": ".request",
    "GrammarSpec": ".request",
    "LLM": ".llm",
    "RequestResult": ".llm",
    "SamplingParams": ".request",
}


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
