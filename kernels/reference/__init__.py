"""The ops in plain torch: the whole contract, on any device. This is the CPU backend."""

from .compress import compress
from .dense_attention import dense_attention
from .kv_write import kv_write
from .norm_rope import add_rms_norm, qkv_norm_rope, rms_norm, swiglu

__all__ = [
    "add_rms_norm",
    "compress",
    "dense_attention",
    "kv_write",
    "qkv_norm_rope",
    "rms_norm",
    "swiglu",
]
