"""A server in a process of its own, for measurements from outside."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

STARTUP_SECONDS = 300
EXIT_SECONDS = 60
COMMAND = (sys.executable, "-m", "nsa_serve.server.cli")
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_READY = re.compile(r"Ready: http://[^:]+:(\d+)/v1")


@dataclass(frozen=True, slots=True)
class ServerUnderTest:
    """A server that takes requests on 127.0.0.1."""

    port: int
    pid: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def engine_pid(self) -> int:
        """The server's child that runs the engine."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        for child in children:
            if b"nsa_serve.engine.process" in Path(f"/proc/{child}/cmdline").read_bytes():
                return int(child)
        raise AssertionError(f"no engine among the children {children} of {self.pid}")


@contextmanager
def serving(*flags: str, command: tuple[str, ...] = COMMAND) -> Iterator[ServerUnderTest]:
    """``serve`` with ``flags`` on a free port, drained at the end.

    Raises ``AssertionError`` where it does not start, or ends with an error.
    """
    arguments = [*command, "serve", "--port", "0", *flags]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
        lines: list[str] = []
        try:
            yield ServerUnderTest(_port(process, lines), process.pid)
        finally:
            process.terminate()
            code = process.wait(timeout=EXIT_SECONDS)
    assert code == 0, f"the server ended with code {code}:\n" + "".join(lines)


def _port(process: subprocess.Popen[str], lines: list[str]) -> int:
    """Wait until the server has said where it listens; its log goes on into ``lines``."""
    ready = threading.Event()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if _READY.match(line):
                ready.set()
        ready.set()

    threading.Thread(target=read, daemon=True).start()
    ready.wait(STARTUP_SECONDS)
    found = next(filter(None, map(_READY.match, lines)), None)
    assert found is not None, "the server did not start:\n" + "".join(lines)
    return int(found[1])


def cpu_seconds(pid: int) -> float:
    """Processor time of a process so far, its own and the kernel's for it."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def resident_bytes(pid: int) -> int:
    """Memory of a process that is in RAM."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
