"""Weights from a checkpoint straight into the model's own parameters, on its device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from types import MappingProxyType

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from .adapter import adapter_shapes, check_base, is_changed, merge
from .checkpoint import Checkpoint, CheckpointFormat
from .config import ModelConfig
from .decoder import Decoder
from .families import Placement, model_config, placements
from .families.placement import fused_rows
from .four_bit import (
    FourBitRows,
    FourBitWeight,
    fits_product,
    four_bit_rows,
    is_four_bit,
    packed_bytes,
)
from .gguf_config import PERMUTED, ROPE_FACTORS, hf_tensor_name
from .gguf_file import TensorEntry
from .linear import uses_four_bit
from .weight_stream import WeightStream

Tensor = torch.Tensor
Progress = Callable[[int, int], None]  # (bytes of weights read, bytes in all), as stored

_FLOATS = ("F64", "F32", "F16", "BF16")
_DEQUANTISED_ROW = 1 << 16
# Recomputed from the configuration, though some checkpoints store them.
_DERIVED = (".rotary_emb.inv_freq", ".masked_bias", ROPE_FACTORS)


def load_decoder(
    checkpoint: Checkpoint,
    config: ModelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    seed: int | None = None,
    progress: Progress | None = None,
    deterministic: bool = False,
    stream: WeightStream | None = None,
) -> Decoder:
    """The model on ``device``. With ``seed``, random weights instead of the checkpoint's.

    ``deterministic`` and ``stream`` as of ``Decoder``; what it streams is loaded to the host.

    Raises ``CheckpointError``, naming file and key, where a tensor is missing, has another shape,
    or has no place in the model.
    """
    homes = {} if stream is None else stream.host_weights()
    if seed is not None:
        weights = random_weights(config, device=device, dtype=dtype, seed=seed, homes=homes)
    else:
        weights = load_weights(
            checkpoint, config, device=device, dtype=dtype, progress=progress, homes=homes
        )
    if stream is not None:
        stream.adopt(weights)
        return Decoder(config, weights, deterministic=deterministic, stream=stream)
    if seed is not None:
        return Decoder(config, weights, deterministic=deterministic)
    packs = uses_four_bit(device, dtype) and not deterministic
    four_bit = load_four_bit(checkpoint, config) if packs else {}
    return Decoder(config, weights, four_bit=four_bit, deterministic=deterministic)


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of ours, by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for place in placements(config):
        rows = max(place.row + place.shape[0], shapes.get(place.parameter, (0,))[0])
        if ".qkv." in place.parameter:
            rows = fused_rows(config).total
        shapes[place.parameter] = (rows, *place.shape[1:])
    return shapes


def num_weight_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes that the weights take on the device, from the configuration alone."""
    return sum(math.prod(shape) for shape in parameter_shapes(config).values()) * dtype.itemsize


def load_weights(
    checkpoint: Checkpoint,
    config: ModelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress | None = None,
    homes: Mapping[str, Tensor] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """Every parameter by name, each row filled exactly once; ``progress`` after every tensor.

    ``homes``, zeroed, hold those parameters that are not to lie on ``device``.
    """
    if checkpoint.base is not None:
        return _load_merged(checkpoint, checkpoint.base, config, device, dtype, progress)
    checkpoint.check_digest()
    places = {place.source: place for place in placements(config)}
    names = _expected_names(checkpoint, config, places)
    # Rows that no tensor fills (padding, biases of some parts alone) stay 0.
    shapes = parameter_shapes(config)
    weights = {
        name: homes[name] if name in homes else torch.zeros(shape, device=device, dtype=dtype)
        for name, shape in shapes.items()
    }
    done, total = 0, sum(checkpoint.tensors[name].num_bytes for name in names)
    for name, tensor in read_tensors(checkpoint, config, names, device):
        place = places[_our_source(checkpoint, name)]
        target = weights[place.parameter]
        target[place.row : place.row + place.shape[0]].copy_(tensor)
        done += checkpoint.tensors[name].num_bytes
        if progress is not None:
            progress(done, total)
    return weights


def _load_merged(
    checkpoint: Checkpoint,
    base: Checkpoint,
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress | None,
) -> dict[str, Tensor]:
    """An adapter and its base, merged."""
    given = load_adapter(checkpoint, config, device=device)
    weights = load_weights(
        base, model_config(base), device=device, dtype=torch.float32, progress=progress
    )
    return merge(config, weights, given, checkpoint.low_rank, parameter_shapes(config), dtype)


def load_adapter(
    checkpoint: Checkpoint, config: ModelConfig, *, device: torch.device
) -> dict[str, Tensor]:
    """The tensors of an adapter as they are stored, by name.

    Raises ``CheckpointError``, naming file and key, where it does not fit its base or the model
    ``config`` that it makes of it.
    """
    assert checkpoint.base is not None
    check_base(config, model_config(checkpoint.base), checkpoint.config_file)
    shapes = parameter_shapes(config)
    expected = adapter_shapes(config, checkpoint.low_rank, shapes, checkpoint.tensors)
    for name, entry in checkpoint.tensors.items():
        if name not in expected:
            raise CheckpointError(f"{entry.file}: {name} has no place in this model")
    for name, shape in expected.items():
        if name not in checkpoint.tensors:
            raise CheckpointError(f"{checkpoint.path}: {name} is missing")
        _check_entry(checkpoint, name, checkpoint.tensors[name], shape)
    return dict(read_tensors(checkpoint, config, list(expected), device))


def load_four_bit(checkpoint: Checkpoint, config: ModelConfig) -> dict[str, FourBitWeight]:
    """The parameters all of whose rows a GGUF file stores in 4-bit groups, by name.

    Of an adapter's base, those that the adapter leaves as they are.
    """
    source = checkpoint if checkpoint.base is None else checkpoint.base
    theirs = config if checkpoint.base is None else model_config(source)
    found = {}
    for parameter, names in four_bit_tensors(checkpoint, config).items():
        rows = [_read_four_bit(source, theirs, name) for name in names]
        found[parameter] = FourBitWeight.of(rows)
    return found


def num_four_bit_bytes(checkpoint: Checkpoint, config: ModelConfig) -> int:
    """Bytes that ``load_four_bit`` will take."""
    shapes = parameter_shapes(config)
    return sum(packed_bytes(*shapes[name]) for name in four_bit_tensors(checkpoint, config))


def four_bit_tensors(checkpoint: Checkpoint, config: ModelConfig) -> dict[str, list[str]]:
    """By parameter: the tensors that hold its rows in 4-bit groups, where they hold all of them.

    Of an adapter's base, those of parameters that the adapter leaves as they are.
    """
    if checkpoint.base is not None:
        stored = four_bit_tensors(checkpoint.base, model_config(checkpoint.base))
        return {n: names for n, names in stored.items() if not is_changed(n, checkpoint.tensors)}
    if checkpoint.format is not CheckpointFormat.GGUF:
        return {}
    named = {hf_tensor_name(name): name for name in checkpoint.tensors}
    parts: dict[str, list[tuple[int, str]]] = {}
    for place in placements(config):
        parts.setdefault(place.parameter, []).append((place.row, named[place.source]))
    shapes = parameter_shapes(config)
    found = {}
    for parameter, rows_and_names in parts.items():
        names = [name for _, name in sorted(rows_and_names)]
        if _is_four_bit(checkpoint, names, num_rows=shapes[parameter][0]):
            found[parameter] = names
    return found


def _is_four_bit(checkpoint: Checkpoint, names: list[str], *, num_rows: int) -> bool:
    entries = [checkpoint.tensors[name] for name in names]
    whole = sum(entry.shape[0] for entry in entries) == num_rows
    return whole and fits_product(num_rows) and all(is_four_bit(e.dtype) for e in entries)


def _read_four_bit(checkpoint: Checkpoint, config: ModelConfig, name: str) -> FourBitRows:
    entry = checkpoint.tensors[name]
    rows = four_bit_rows(_raw_bytes(entry), entry.dtype, entry.shape)
    heads = _permuted_heads(checkpoint, config, name)
    if heads is None:
        return rows
    return FourBitRows(
        undo_rope_permutation(rows.q, heads), undo_rope_permutation(rows.scales, heads)
    )


def random_weights(
    config: ModelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    homes: Mapping[str, Tensor] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """Weights drawn on the device, scaled so that activations stay of order one.

    Those with a home in ``homes`` go there.
    """
    generator = torch.Generator(device).manual_seed(seed)
    weights = {}
    for name, shape in parameter_shapes(config).items():
        drawn = _random(name, shape, generator, dtype)
        weights[name] = homes[name].copy_(drawn) if name in homes else drawn
    return weights


def _random(
    name: str, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype
) -> Tensor:
    device = generator.device
    if name.endswith("norm"):
        return torch.ones(shape, device=device, dtype=dtype)
    if name.endswith("bias"):
        return torch.zeros(shape, device=device, dtype=dtype)
    # φ's matrices are [in, out], ours [out, in]; φ's weights of tokens are [heads, tokens].
    fan_in = shape[-2] if ".phi_" in name and not name.endswith("_k.position") else shape[-1]
    tensor = torch.empty(shape, device=device, dtype=dtype)
    return tensor.normal_(0, fan_in**-0.5, generator=generator)


def _expected_names(
    checkpoint: Checkpoint, config: ModelConfig, places: dict[str, Placement]
) -> list[str]:
    """The checkpoint's tensors that have a place, checked: all there, none over, shapes right."""
    named = {_our_source(checkpoint, name): name for name in checkpoint.tensors}
    for source in places:
        if source not in named:
            raise CheckpointError(f"{checkpoint.path}: {source} is missing")
    for source, name in named.items():
        entry = checkpoint.tensors[name]
        if source in places:
            _check_entry(checkpoint, name, entry, places[source].shape)
        elif not _may_be_ignored(source, config):
            raise CheckpointError(f"{entry.file}: {name} has no place in this model")
    return [named[source] for source in places]


def _check_entry(
    checkpoint: Checkpoint, name: str, entry: TensorEntry, shape: tuple[int, ...]
) -> None:
    if entry.shape != shape:
        raise CheckpointError(
            f"{entry.file}: {name} has shape {list(entry.shape)}, "
            f"the configuration makes it {list(shape)}"
        )
    if checkpoint.format is not CheckpointFormat.GGUF and entry.dtype not in _FLOATS:
        raise CheckpointError(f"{entry.file}: {name} is {entry.dtype}, which is not supported")


def _may_be_ignored(source: str, config: ModelConfig) -> bool:
    if source == "lm_head.weight":
        return config.tie_embeddings
    if ".self_attn.compress_" in source:
        # Served dense: φ is of no use.
        return config.nsa is None and config.family == "nsa_serve"
    return source.endswith(_DERIVED)


def _our_source(checkpoint: Checkpoint, name: str) -> str:
    return hf_tensor_name(name) if checkpoint.format is CheckpointFormat.GGUF else name


def read_tensors(
    checkpoint: Checkpoint, config: ModelConfig, names: list[str], device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """(the checkpoint's name, the tensor) of each of ``names``, file by file."""
    if checkpoint.format is CheckpointFormat.GGUF:
        for name in names:
            yield name, _read_gguf(checkpoint, config, name)
        return
    by_file = sorted(names, key=lambda name: _position(checkpoint.tensors[name]))
    for file, group in groupby(by_file, key=lambda name: checkpoint.tensors[name].file):
        try:
            with safe_open(file, framework="pt", device=str(device)) as tensors:
                for name in group:
                    yield name, tensors.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{file}: {error}") from error


def _position(entry: TensorEntry) -> tuple[str, int]:
    return str(entry.file), entry.offset


def _read_gguf(checkpoint: Checkpoint, config: ModelConfig, name: str) -> Tensor:
    entry = checkpoint.tensors[name]
    type_ = gguf.GGMLQuantizationType[entry.dtype]
    try:
        rows = gguf.quants.dequantize(_raw_bytes(entry).reshape(*_byte_shape(entry)), type_)
    except NotImplementedError as error:
        raise CheckpointError(f"{entry.file}: {name} is {entry.dtype}: {error}") from error
    tensor = torch.from_numpy(np.asarray(rows, np.float32)).reshape(entry.shape)
    heads = _permuted_heads(checkpoint, config, name)
    return tensor if heads is None else undo_rope_permutation(tensor, heads)


def _raw_bytes(entry: TensorEntry) -> NDArray[np.uint8]:
    return np.fromfile(entry.file, np.uint8, entry.num_bytes, offset=entry.offset)


def _permuted_heads(checkpoint: Checkpoint, config: ModelConfig, name: str) -> int | None:
    """Heads of a tensor whose rows llama.cpp has in its own order; None for every other."""
    if checkpoint.config["model_type"] not in PERMUTED:
        return None
    heads = {"attn_q": config.num_q_heads, "attn_k": config.num_kv_heads}
    return heads.get(name.split(".")[-2])


def _byte_shape(entry: TensorEntry) -> tuple[int, int]:
    """(rows, bytes) with several of the tensor's rows in one.

    The library works on 16 rows at a time; with short rows its overhead is most of the load.
    """
    rows, merged = math.prod(entry.shape[:-1]), 1
    while rows % (2 * merged) == 0 and 2 * merged * entry.shape[-1] <= _DEQUANTISED_ROW:
        merged *= 2
    return rows // merged, entry.num_bytes // rows * merged


def undo_rope_permutation(tensor: Tensor, heads: int) -> Tensor:
    """Rows of a q or k projection of llama.cpp's order (rotated pairs adjacent), halves paired.

    ``tensor`` is a weight [heads·D, in], a bias [heads·D] or what else has a row for each output.
    """
    pairs = tensor.view(heads, -1, 2, *tensor.shape[1:])  # [heads, D/2, 2, ...]
    return pairs.transpose(1, 2).reshape(tensor.shape)
