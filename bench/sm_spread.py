"""How evenly a prefill layer's kernels keep the multiprocessors busy, by Nsight Compute.

``python -m nsa_serve.bench.sm_spread LENGTH`` runs the layer once; ``measure`` runs that under
``ncu`` and reads off, for each kernel, the cycles that multiprocessors were active.
"""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..kernels import gpu
from ..kernels.shapes import Compressor, NSAShape
from .synthetic import AttentionShape, local_selection, make_case

# The passes over a prompt, as their kernels are called.
_KERNELS = ("_attend_kernel", "_score_kernel", "_window_kernel", "_sparse_kernel")
_METRICS = ("sm__cycles_active.max", "sm__cycles_active.avg")
# A trained model's tokens keep most of their neighbours' choices.
_LOCALITY = 0.7


@dataclass(frozen=True, slots=True)
class Spread:
    """One kernel's launch: cycles that the multiprocessors were active."""

    kernel: str
    most: float
    mean: float

    @property
    def share(self) -> float:
        """(most − mean) / mean: what an even division of the work would save."""
        return self.most / self.mean - 1

    def record(self) -> dict[str, Any]:
        return {**asdict(self), "spread": self.share}


def measure(length: int) -> list[Spread]:
    """Spread of every kernel over a prompt of ``length`` tokens; empty without ``ncu``."""
    ncu = shutil.which("ncu")
    if ncu is None:
        return []
    found = subprocess.run(
        [
            ncu, "--csv", "--metrics", ",".join(_METRICS),
            "--kernel-name", f"regex:{'|'.join(_KERNELS)}",
            sys.executable, "-m", __name__, str(length),
        ],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return read_report(found.stdout)


def read_report(report: str) -> list[Spread]:
    """Launches in ncu's CSV, in order; lines before the header are its own messages."""
    lines = report.splitlines()
    header = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    launches: dict[str, dict[str, str]] = defaultdict(dict)
    for row in csv.DictReader(lines[header:]):
        launch = launches[row["ID"]]
        launch["kernel"] = row["Kernel Name"]
        launch[row["Metric Name"]] = row["Metric Value"]
    most, mean = _METRICS
    return [
        Spread(found["kernel"], _number(found[most]), _number(found[mean]))
        for found in launches.values()
    ]


def _number(shown: str) -> float:
    return float(shown.replace(",", ""))


def run_layer(length: int) -> None:
    """The attention of one layer over a prompt, once, on the paper's heads."""
    shape, nsa = AttentionShape(), NSAShape()
    case = make_case(
        shape, nsa, num_rows=1, context_len=length, query_len=length, device="cuda",
        dtype=torch.bfloat16,
    )  # fmt: skip
    gpu.kv_write(
        case.k, case.v, case.kv, case.compressed, case.batch, nsa=nsa, compressor=Compressor()
    )
    out, _ = gpu.compressed_attention(case.q, case.compressed, case.batch, nsa=nsa)
    selection = local_selection(case.batch.positions, shape.num_kv_heads, nsa, _LOCALITY)
    gpu.sparse_attention(case.q, case.kv, selection, out, case.gate_logits, case.batch, nsa=nsa)
    torch.cuda.synchronize()


if __name__ == "__main__":
    run_layer(int(sys.argv[1]))
