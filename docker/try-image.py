#!/usr/bin/env python3
"""Run an image of build-without-daemon.sh as a container would be, and check what it promises.

    docker/try-image.py [FOLDER/cpu]

The container has crun as its runtime, a read-only root, no capabilities, and a network of its own
with nothing in it. It must answer a chat request there, be healthy, be seen to be unhealthy while
its engine is frozen, and on SIGTERM finish what runs and exit with 0. Needs root and Debian's crun.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

USER = "10001:10001"
NAME = f"nsa-serve-try-{os.getpid()}"
START_SECONDS = 180.0
FREEZE_SECONDS = 60.0
STOP_SECONDS = 120.0
HYBRID = Path("/sys/fs/cgroup/unified")
CRUN = ("crun", "--cgroup-manager=disabled")
# Runs inside the container, with nothing but its own Python.
ASK = """
import json, sys, urllib.request
body = {"messages": [{"role": "user", "content": sys.argv[1]}], "temperature": 0,
        "max_tokens": int(sys.argv[2]), "ignore_eos": len(sys.argv) > 3}
request = urllib.request.Request("http://127.0.0.1:8000/v1/chat/completions",
    json.dumps(body).encode(), {"Content-Type": "application/json"})
print(json.load(urllib.request.urlopen(request, timeout=300))["choices"][0]["message"]["content"])
"""


def specification(image: Path) -> dict[str, Any]:
    """What crun is to run: the image's own command, user and environment, and as few rights as
    possible."""
    config = json.loads((image / "image.json").read_text())["Docker"]["config"]
    user, group = map(int, config["User"].split(":"))
    scratch = [f"uid={user}", f"gid={group}", "mode=0700", "nosuid", "nodev"]
    mounts = [
        ("/proc", "proc", "proc", []),
        ("/dev", "tmpfs", "tmpfs", ["nosuid", "mode=755", "size=65536k"]),
        ("/dev/shm", "tmpfs", "shm", ["nosuid", "noexec", "nodev", "mode=1777"]),
        ("/sys", "sysfs", "sysfs", ["nosuid", "noexec", "nodev", "ro"]),
        ("/tmp", "tmpfs", "tmpfs", ["mode=1777", "nosuid", "nodev"]),
        ("/cache", "tmpfs", "tmpfs", scratch),
    ]
    return {
        "ociVersion": "1.0.0",
        "process": {
            "terminal": False,
            "user": {"uid": user, "gid": group},
            "args": [*config["Entrypoint"], *config["Cmd"]],
            "env": [*config["Env"], "OMP_NUM_THREADS=2"],
            "cwd": config["WorkingDir"],
            "capabilities": {
                kind: [] for kind in ("bounding", "effective", "inheritable", "permitted")
            },
            "noNewPrivileges": True,
        },
        "root": {"path": str(image / "rootfs"), "readonly": True},
        "hostname": "nsa-serve",
        "mounts": [
            {"destination": where, "type": kind, "source": source, "options": options}
            for where, kind, source, options in mounts
        ],
        "linux": {
            "namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount")]
        },
    }


class Container:
    """A running container; the process that waits for it is its own parent here."""

    def __init__(self, image: Path, folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(specification(image)))
        self.process = subprocess.Popen([*CRUN, "run", "--bundle", str(folder), NAME])

    def call(self, *command: str, user: str = USER) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*CRUN, "exec", f"--user={user}", NAME, *command],
            capture_output=True,
            text=True,
            check=False,
        )

    def start(self, *command: str) -> subprocess.Popen[str]:
        line = [*CRUN, "exec", f"--user={USER}", NAME, *command]
        return subprocess.Popen(line, stdout=subprocess.PIPE, text=True)

    def is_healthy(self) -> bool:
        return self.call("healthcheck").returncode == 0

    def engine(self) -> int:
        """The engine's process id inside the container."""
        find = (
            "import os; print(*(p for p in os.listdir('/proc') if p.isdigit() and "
            "b'engine.process' in open(f'/proc/{p}/cmdline','rb').read()))"
        )
        return int(self.call("python3", "-c", find).stdout.split()[0])

    def signal(self, number: signal.Signals) -> None:
        """To PID 1, as `docker stop` does."""
        subprocess.run([*CRUN, "kill", NAME, str(int(number))], check=True)


def await_true(holds: Any, seconds: float, what: str) -> float:
    """Seconds until ``holds()``; ends the program where that takes too long."""
    started = time.monotonic()
    while not holds():
        expect(time.monotonic() - started < seconds, f"{what} within {seconds:g} s")
        time.sleep(0.5)
    return time.monotonic() - started


def expect(holds: bool, what: str) -> None:
    if not holds:
        sys.exit(f"FAILED: {what}")


def check(container: Container) -> None:
    took = await_true(container.is_healthy, START_SECONDS, "healthy")
    print(f"healthy after {took:.1f} s")
    answer = container.call("python3", "-c", ASK, "What is the capital of France?", "16").stdout
    expect("Paris" in answer, f"an answer with Paris in it, not {answer!r}")
    print(f"answers without a network: {answer.strip()}")
    first = container.call("cat", "/proc/1/comm").stdout.strip()
    expect(first == "tini", f"tini is PID 1, not {first}")
    user = container.call("stat", "--format=%u", "/proc/1").stdout.strip()
    expect(user == "10001", f"the server's user is 10001, not {user}")
    written = container.call("touch", "/etc/x", user="0:0")
    expect("Read-only" in written.stderr, "the root file system can't be written to, even by root")
    print(f"PID 1 is {first}, the user {user}, the root file system read-only")
    check_health(container)
    check_stop(container)


def check_health(container: Container) -> None:
    engine = container.engine()
    container.call("python3", "-c", f"import os; os.kill({engine}, 19)")
    took = await_true(lambda: not container.is_healthy(), FREEZE_SECONDS, "unhealthy when frozen")
    container.call("python3", "-c", f"import os; os.kill({engine}, 18)")
    await_true(container.is_healthy, FREEZE_SECONDS, "healthy again")
    print(f"unhealthy {took:.1f} s after its engine froze, healthy again when it runs")


def check_stop(container: Container) -> None:
    running = container.start("python3", "-c", ASK, "Count to a hundred.", "16", "on")
    is_open = (
        "import json, urllib.request as u; r = json.load(u.urlopen('http://127.0.0.1:8000/status'));"
        "raise SystemExit(not r['requests']['running'])"
    )
    await_true(lambda: container.call("python3", "-c", is_open).returncode == 0, 60, "it runs")
    asked = time.monotonic()
    container.signal(signal.SIGTERM)
    text, _ = running.communicate(timeout=STOP_SECONDS)
    code = container.process.wait(STOP_SECONDS)
    took = time.monotonic() - asked
    expect(bool(text.strip()), "the request that ran at SIGTERM is answered")
    expect(code == 0, f"exit code 0 after SIGTERM, not {code}")
    print(f"SIGTERM: what ran was answered, exit code {code} after {took:.1f} s")


def leave_hybrid_cgroups() -> None:
    """crun refuses a machine with both kinds of control groups, of which it is to use none here.

    So this program starts over where the second kind isn't mounted.
    """
    if HYBRID.is_mount():
        script = f'umount {HYBRID} && exec "$@"'
        again = [sys.executable, *sys.argv]
        os.execvp("unshare", ["unshare", "--mount", "sh", "-c", script, "sh", *again])


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("image", nargs="?", default="build/images/cpu", type=Path)
    image = arguments.parse_args().image.resolve()
    leave_hybrid_cgroups()
    with tempfile.TemporaryDirectory() as folder:
        container = Container(image, Path(folder))
        try:
            check(container)
        finally:
            if container.process.poll() is None:
                subprocess.run([*CRUN, "delete", "--force", NAME], check=False)
                container.process.wait(STOP_SECONDS)
    print("The image keeps its promises.")


if __name__ == "__main__":
    main()
