"""What a model's K/V depend on beside the tokens, in a digest of constant length."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b

from ..errors import CheckpointError
from .checkpoint import Checkpoint

# Bytes of a tensor that are read: a whole checkpoint would take longer than it takes to load.
_SAMPLES = 4
_SAMPLE_BYTES = 4096


def model_identity(checkpoint: Checkpoint, *facts: object) -> bytes:
    """A digest [32] of ``facts`` and of the checkpoint's weights.

    Of the weights: every tensor's name, type, shape and a sample of its bytes, and each file's size
    and time of change. Raises ``CheckpointError`` where a file can't be read.
    """
    found = blake2b(digest_size=32, person=b"model")
    found.update(repr(facts).encode())
    for part in _parts(checkpoint):
        found.update(len(part).to_bytes(8, "little") + part)
    return found.digest()


def _parts(checkpoint: Checkpoint) -> Iterator[bytes]:
    if checkpoint.base is not None:
        yield from _parts(checkpoint.base)
    try:
        yield from _sampled(checkpoint)
    except OSError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error


def _sampled(checkpoint: Checkpoint) -> Iterator[bytes]:
    tensors = checkpoint.tensors.values()
    for file in sorted({entry.file for entry in tensors}):
        with file.open("rb") as handle:
            stat = file.stat()
            yield f"{stat.st_size} {stat.st_mtime_ns}".encode()
            for name, entry in sorted(checkpoint.tensors.items()):
                if entry.file != file:
                    continue
                yield f"{name} {entry.dtype} {entry.shape}".encode()
                step = max(0, entry.num_bytes - _SAMPLE_BYTES) // (_SAMPLES - 1)
                for at in range(_SAMPLES):
                    handle.seek(entry.offset + at * step)
                    yield handle.read(min(_SAMPLE_BYTES, entry.num_bytes))
