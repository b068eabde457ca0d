"""The output of a batch: whole lines only, whatever happens, so that a run can be resumed."""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from ...errors import BatchStopped, ConfigError
from .lines import BadLine, BatchRequest

# Every line begins so, by which an output is known from any other file.
_BEGINNING = b'{"id": "batch_req_'


class ResultFile:
    """Answers, appended to a file that one run at a time writes.

    Opening keeps the lines of a run before, without a last line that was torn. A line that can't
    be written whole is taken back.
    """

    def __init__(self, path: Path) -> None:
        """Raises ``ConfigError`` where the file can't be written or isn't of a batch."""
        self.path = path
        self.num_kept = 0
        self._custom_ids: set[str] = set()
        self._bad_lines: set[int] = set()
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConfigError(f"--output-file {path}: {error.strerror}") from None
        try:
            self._lock()
            self._size = self._take_up()
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def has(self, line: BatchRequest | BadLine) -> bool:
        """Whether a line of the input has its answer already."""
        if isinstance(line, BadLine):
            return line.number in self._bad_lines
        return line.custom_id in self._custom_ids

    def add_answer(self, request: BatchRequest, status: int, request_id: str, body: Any) -> None:
        """Write an answer; one with an error is both, the answer and the line's error."""
        response = {"status_code": status, "request_id": request_id, "body": body}
        error = None
        if status >= 400:
            told = body["error"]
            error = {"code": told["code"] or told["type"], "message": told["message"]}
        self._add(request.custom_id, response, error)

    def add_bad(self, line: BadLine) -> None:
        """Write why a line was not asked. Its number tells it from the others on resuming."""
        error = {"code": line.code, "message": line.message, "line": line.number}
        self._add(line.custom_id, None, error)

    def flush(self) -> None:
        """Have the disk hold everything. Raises ``BatchStopped`` where it can't."""
        try:
            os.fsync(self._file)
        except OSError as error:
            raise self._stopped(error) from None

    def _add(self, custom_id: str | None, response: Any, error: Any) -> None:
        # The id is first, as _BEGINNING has it.
        entry = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": custom_id}
        text = json.dumps({**entry, "response": response, "error": error}, ensure_ascii=False)
        self._append(text.encode("utf-8", "replace") + b"\n")

    def _append(self, line: bytes) -> None:
        left = memoryview(line)
        try:
            while left:
                left = left[os.write(self._file, left) :]
        except OSError as error:
            os.ftruncate(self._file, self._size)
            raise self._stopped(error) from None
        self._size += len(line)

    def _stopped(self, error: OSError) -> BatchStopped:
        return BatchStopped(
            f"--output-file {self.path}: {error.strerror}. What was answered is kept; run the "
            "same command again to go on"
        )

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"--output-file {self.path}: another run writes to it") from None

    def _take_up(self) -> int:
        """Read what a run before has left; the size of its whole lines, to which it is cut."""
        size = 0
        with os.fdopen(os.dup(self._file), "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.startswith(_BEGINNING[: len(line)]):
                    raise self._foreign(number)
                if not line.endswith(b"\n"):
                    break
                self._keep(number, line)
                size += len(line)
        os.ftruncate(self._file, size)
        os.lseek(self._file, size, os.SEEK_SET)
        return size

    def _keep(self, number: int, line: bytes) -> None:
        try:
            entry = json.loads(line)
            custom_id, error = entry["custom_id"], entry["error"]
        except (ValueError, KeyError, RecursionError):
            raise self._foreign(number) from None
        self.num_kept += 1
        if error and "line" in error:
            self._bad_lines.add(error["line"])
        else:
            self._custom_ids.add(custom_id)

    def _foreign(self, number: int) -> ConfigError:
        return ConfigError(
            f"--output-file {self.path}: line {number} is no answer of a batch; name another file"
        )


def remaining(
    lines: Iterator[BatchRequest | BadLine], results: ResultFile
) -> Iterator[BatchRequest | BadLine]:
    """The lines that have no answer yet."""
    return (line for line in lines if not results.has(line))
