"""Results as a JSON file that grows while an evaluation runs, and from which it goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError

FORMAT = 1
Item = Mapping[str, Any]


class Record:
    """The file of one evaluation: what was asked of what, and each item's result by its key."""

    def __init__(self, path: Path, head: Mapping[str, Any], items: dict[str, Item]) -> None:
        self.path = path
        self.head = head
        self.items = items

    @classmethod
    def open(
        cls, path: Path, kind: str, subject: Mapping[str, Any], settings: Mapping[str, Any]
    ) -> Record:
        """A new record, or the one at ``path`` if it is of the same evaluation.

        Raises ``ConfigError`` where the file holds anything else.
        """
        head = {"format": FORMAT, "kind": kind, "subject": dict(subject), "settings": settings}
        # As JSON gives it back: tuples are lists there.
        head = json.loads(json.dumps(head))
        if not path.exists():
            return cls(path, head, {})
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            items = dict(known["items"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"--output {path} is no record of an evaluation: {error}") from None
        for part, value in head.items():
            if known.get(part) != value:
                raise ConfigError(
                    f"--output {path} is of another evaluation: its {part} is {known.get(part)}, "
                    f"not {value}; name another file or delete it"
                )
        return cls(path, head, items)

    def __contains__(self, key: str) -> bool:
        return key in self.items

    def add(self, items: Mapping[str, Item]) -> None:
        """Keep ``items``, on disk before this returns."""
        self.items.update(items)
        self._write({**self.head, "items": self.items})

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the whole with its ``summary`` before the items."""
        self._write({**self.head, "summary": summary, "items": self.items})

    def _write(self, content: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Replaced whole: an interrupted write must not lose what was there.
        fresh = self.path.with_suffix(f"{self.path.suffix}.part")
        fresh.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(fresh, self.path)
