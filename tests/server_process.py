"""``nsa-serve serve`` as a process of its own, and a small model to start it with."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

STARTUP_SECONDS = 120
EXIT_SECONDS = 60
COMMAND = (sys.executable, "-m", "nsa_serve.server.cli", "serve", "--device", "cpu", "--port", "0")
_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


class ServerProcess:
    """A server that has said that it is ready; ``lines`` is what it wrote so far."""

    def __init__(self, arguments: Sequence[str]) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [*COMMAND, *arguments], stderr=subprocess.PIPE, text=True, env=environment
        )
        self.lines: list[str] = []
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        started = self._ready.wait(STARTUP_SECONDS)
        found = re.search(r"Ready: (\S+)/v1", "".join(self.lines))
        if not started or found is None:
            self.stop()
            raise AssertionError("the server did not start:\n" + "".join(self.lines))
        self.url = found[1]

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if line.startswith("Ready:"):
                self._ready.set()
        self._ready.set()

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def engine_pid(self) -> int:
        """The engine's process: the server's child that runs it."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for child in children:
            if b"nsa_serve.engine.process" in Path(f"/proc/{child}/cmdline").read_bytes():
                return int(child)
        raise AssertionError(f"no engine among the children {children}")

    def wait(self) -> int:
        """The exit code."""
        code = self.process.wait(EXIT_SECONDS)
        self._reader.join(EXIT_SECONDS)
        return code

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(EXIT_SECONDS)
        self._reader.join(EXIT_SECONDS)
        assert self.process.stderr is not None
        self.process.stderr.close()


@contextmanager
def running(*arguments: str) -> Iterator[ServerProcess]:
    """A server with these flags, on a free port."""
    server = ServerProcess(arguments)
    try:
        yield server
    finally:
        server.stop()


def write_small_model(folder: Path) -> Path:
    """A model of bytes, to be served with random weights: it starts at once and says nonsense."""
    pieces = ByteLevel.alphabet()
    vocabulary = {piece: number for number, piece in enumerate(sorted(pieces))}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": _TEMPLATE}))
    config = {
        "model_type": "llama", "vocab_size": len(vocabulary), "hidden_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "intermediate_size": 32, "max_position_embeddings": 65536, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder
