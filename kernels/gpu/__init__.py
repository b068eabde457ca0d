"""The ops in Triton: same names and signatures as the reference, for CUDA tensors.

What edits logits is the reference's own: a few element-wise or top-k calls of torch on [B, V], for
the few requests that ask, without a host sync.
"""

from ..reference.sampling import (
    add_bias,
    apply_penalties,
    gumbel_noise,
    mask_logits,
    token_logprobs,
)
from .block_copy import fetch_blocks, prefetch_blocks
from .clock import add_clock
from .compress import compress
from .compressed_attention import compressed_attention
from .compressed_training import compressed_backward, compressed_with_lse
from .dense_attention import dense_attention
from .gate_backward import gate_backward
from .gated_fusion import gated_fusion, sparse_attention
from .kv_write import kv_write
from .linear import linear
from .norm_rope import add_rms_norm, qkv_norm_rope, rms_norm, swiglu
from .sampling import sample
from .select_blocks import block_scores, select_blocks
from .selected_attention import selected_attention
from .sparse_training import selected_with_lse, sparse_backward, window_with_lse
from .swiglu_product import swiglu_product
from .window_attention import window_attention

__all__ = [
    "add_bias",
    "add_clock",
    "add_rms_norm",
    "apply_penalties",
    "block_scores",
    "compress",
    "compressed_attention",
    "compressed_backward",
    "compressed_with_lse",
    "dense_attention",
    "fetch_blocks",
    "gate_backward",
    "gated_fusion",
    "gumbel_noise",
    "kv_write",
    "linear",
    "mask_logits",
    "prefetch_blocks",
    "qkv_norm_rope",
    "rms_norm",
    "sample",
    "select_blocks",
    "selected_attention",
    "selected_with_lse",
    "sparse_attention",
    "sparse_backward",
    "swiglu",
    "swiglu_product",
    "token_logprobs",
    "window_attention",
    "window_with_lse",
]
