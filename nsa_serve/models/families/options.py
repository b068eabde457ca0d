"""Reading config.json: every key is either read, known to be harmless, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import CheckpointError
from ..config import RopeConfig

# Of no effect on inference, whatever their value.
_HARMLESS = frozenset(
    {
        *("_name_or_path", "architectures", "model_type", "transformers_version", "torch_dtype"),
        *("dtype", "use_cache", "attention_dropout", "attention_probs_dropout_prob"),
        *("hidden_dropout", "embd_pdrop", "resid_pdrop", "initializer_range", "pad_token_id"),
        *("bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id"),
        *("max_window_layers", "output_attentions", "output_hidden_states", "return_dict"),
        *("return_dict_in_generate", "unsloth_fixed", "unsloth_version", "id2label", "label2id"),
        *("transformers.js_config", "problem_type", "task_specific_params", "finetuning_task"),
        *("chunk_size_feed_forward", "is_llama_config", "name", "license", "language", "tags"),
    }
)
# Of no effect at these values; at any other the model's maths would differ from ours.
_HARMLESS_AT: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "mlp_bias": (False, None),
    "pretraining_tp": (1, None),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "rope_interleaved": (False, None),
    "quantization_config": (None,),
    "auto_map": (None,),
    "is_decoder": (True, False, None),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": ({}, None),
    "use_mrope": (False, None),
    "attention_chunk_size": (None,),
    "num_experts": (0, None),
    "num_local_experts": (0, None),
    "tf_legacy_loss": (False,),
    "use_bfloat16": (False, True),
    "torchscript": (False,),
}
_NEED_ORIGINAL = ("llama3", "yarn", "longrope", "dynamic")


class Options:
    """A config.json of which each key that is read is ticked off; ``finish`` refuses the rest."""

    def __init__(self, config: Mapping[str, Any], file: str) -> None:
        self.config = config
        self.file = file
        self._read: set[str] = set()

    def need(self, key: str) -> Any:
        """The value of a key that must be there, and not null."""
        value = self.get(key)
        if value is None:
            raise CheckpointError(f"{self.file}: {key} is missing")
        return value

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, ``default`` where it is absent or null."""
        self._read.add(key)
        value = self.config.get(key)
        return default if value is None else value

    def count(self, key: str, default: int | None = None) -> int:
        """A positive whole number."""
        value = self.need(key) if default is None else self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.refusal(key, value, "must be a positive whole number")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.refusal(key, value, "must be true or false")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refusal(key, value, "must be a number")
        return float(value)

    def table(self, key: str) -> dict[str, Any]:
        """An object; an empty one where the key is absent or null."""
        value = self.get(key, {})
        if not isinstance(value, dict):
            raise self.refusal(key, value, "must be an object")
        return value

    def refusal(self, key: str, value: Any, why: str = "is not supported") -> CheckpointError:
        return CheckpointError(f"{self.file}: {key} = {value!r} {why}")

    def finish(self) -> None:
        """Raise ``CheckpointError`` for the first key that was neither read nor is harmless."""
        for key, value in self.config.items():
            if key in self._read or key in _HARMLESS:
                continue
            if key not in _HARMLESS_AT or value not in _HARMLESS_AT[key]:
                raise self.refusal(key, value)


def transformer_fields(options: Options, head_dim: int | None = None) -> dict[str, Any]:
    """The fields of ``ModelConfig`` that all families of the Llama kind state alike.

    ``head_dim`` is the family's default; None divides the hidden size among the query heads.
    """
    hidden, heads = options.count("hidden_size"), options.count("num_attention_heads")
    kv_heads = options.count("num_key_value_heads", heads)
    if heads % kv_heads:
        raise options.refusal("num_key_value_heads", kv_heads, f"does not divide {heads} heads")
    head_dim = options.count("head_dim", head_dim or max(hidden // heads, 1))
    rope, max_position = read_rope(options, head_dim)
    _only_full_attention(options)
    return {
        "vocab_size": options.count("vocab_size"),
        "hidden_size": hidden,
        "num_layers": options.count("num_hidden_layers"),
        "num_q_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim_k": head_dim,
        "head_dim_v": head_dim,
        "intermediate_size": options.count("intermediate_size"),
        "max_position": max_position,
        "rms_norm_eps": options.number("rms_norm_eps", 1e-6),
        "rope": rope,
        "tie_embeddings": options.flag("tie_word_embeddings"),
    }


def _only_full_attention(options: Options) -> None:
    for kind in options.get("layer_types", []):
        if kind != "full_attention":
            raise options.refusal("layer_types", kind)


def read_rope(options: Options, head_dim: int) -> tuple[RopeConfig, int]:
    """(the rotary embedding, the context it is good for).

    Older files have ``rope_theta`` and ``rope_scaling``, newer ones ``rope_parameters``.
    """
    scaling = {**options.table("rope_scaling"), **options.table("rope_parameters")}
    # Before "rope_type" the key was "type", and longrope was "su".
    kind = scaling.pop("rope_type", None) or scaling.get("type") or "default"
    scaling.pop("type", None)
    kind = "longrope" if kind == "su" else kind
    theta = scaling.pop("rope_theta", None) or options.get("rope_theta", 10_000.0)
    options.get("rope_theta")
    part = scaling.pop("partial_rotary_factor", None)
    part = options.number("partial_rotary_factor", 1.0) if part is None else float(part)
    context = options.count("max_position_embeddings")
    original = _original_context(options, scaling, kind, context)
    if kind in ("yarn", "longrope") and scaling.get("factor") is None and original:
        scaling["factor"] = context / original
    rope = RopeConfig(
        theta=float(theta),
        kind=kind,
        rotary_dim=None if part == 1.0 else int(head_dim * part),
        original_max_position=original,
        options=scaling,
    )
    return rope, _served_context(rope, context)


def _original_context(
    options: Options, scaling: dict[str, Any], kind: str, context: int
) -> int | None:
    """Tokens of the context before it was stretched."""
    outer = options.get("original_max_position_embeddings")
    inner = scaling.pop("original_max_position_embeddings", None)
    if kind not in _NEED_ORIGINAL:
        return None
    # Dynamic scaling is defined from max_position_embeddings itself.
    return int(context if kind == "dynamic" else outer or inner or context)


def _served_context(rope: RopeConfig, context: int) -> int:
    """Tokens that a stretched context holds, where max_position_embeddings is that before it."""
    factor = rope.options.get("factor")
    if rope.kind in ("yarn", "dynamic") and factor and rope.original_max_position:
        return max(context, int(rope.original_max_position * factor))
    return context


def eos_token_ids(config: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    """Tokens that end a text: those of generation_config.json, else those of config.json."""
    value = generation.get("eos_token_id")
    value = config.get("eos_token_id") if value is None else value
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (int(value),)
