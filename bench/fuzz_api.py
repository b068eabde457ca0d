"""schemathesis over a whole server without a model: what its description allows, and what not.

Looked for: answers of 500 and above, statuses and bodies that the description does not know,
wrong input that is accepted, and a server that is not alive afterwards.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from .front_end_load import conditions
from .report import save_json
from .server_process import serving

# Not among them: that whatever fits the description is accepted. Meaning is not all in types.
CHECKS = (
    *("not_a_server_error", "status_code_conformance", "content_type_conformance"),
    *("response_schema_conformance", "negative_data_rejection", "unsupported_method"),
)
# Answers of a few tokens; the default is all that the context leaves.
FLAGS = ("--mock-engine", "20000", "--max-model-len", "64")


def run_schemathesis(url: str, num_examples: int) -> tuple[int, str]:
    """Exit code and output; ``num_examples`` for each route, beside those that cover its schema."""
    command = [
        *(str(Path(sys.executable).with_name("schemathesis")), "run", f"{url}/openapi.json"),
        *("--max-examples", str(num_examples), "--phases", "coverage,fuzzing", "--mode", "all"),
        *("--checks", ",".join(CHECKS), "--continue-on-failure", "--no-color"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def summary(output: str) -> dict[str, Any]:
    """The figures that schemathesis prints at its end. Raises ``ValueError`` where it has none."""
    tested = re.search(r"Tested: (\d+)", output)
    cases = re.search(r"(\d+) generated", output)
    if tested is None or cases is None:
        raise ValueError("schemathesis did not come to its end:\n" + output[-2000:])
    failures = re.search(r"(\d+) unique failure", output)
    return {
        "routes": int(tested[1]),
        "cases": int(cases[1]),
        "failures": int(failures[1]) if failures else 0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=200, help="for each route")
    parser.add_argument("--result", type=Path, default=Path("bench-results/fuzz_api.json"))
    asked = parser.parse_args()
    start = time.monotonic()
    with serving(*FLAGS) as server:
        code, output = run_schemathesis(server.url, asked.examples)
        alive = httpx.get(f"{server.url}/health", timeout=30).status_code == 200
    record = {
        **conditions(),
        "examples_per_route": asked.examples,
        "checks": list(CHECKS),
        **summary(output),
        "alive_after": alive,
        "seconds": round(time.monotonic() - start),
    }
    save_json(asked.result, record)
    print(output)
    if code or not alive:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
