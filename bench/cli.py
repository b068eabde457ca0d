"""``nsa-serve bench``: commands by name, their rooms imported to run them.

Load tests need no torch, which takes seconds to import.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

# Command -> (its room, what it is for).
_COMMANDS = {
    "serve": ("load.cli", "Load a running server: TTFT, time per token, throughput."),
    "sweep": ("load.cli", "Find the rate at which a server saturates or breaks its limits."),
    "kernels": ("engine_cli", "One layer's kernels against torch SDPA, on this GPU."),
    "latency": ("engine_cli", "Time to first token and decode steps of a whole engine."),
    "timeline": ("engine_cli", "What the GPU does in a decode step, and how busy it is."),
    "throughput": ("engine_cli", "Tokens per second of many requests at once, offline."),
}


class _Rooms(TyperGroup):
    """Knows every command by name, and imports a room only for its own.

    It lists none, because a list would import them all; the help text has their names.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        return []

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in _COMMANDS:
            return None
        room = import_module(f".{_COMMANDS[cmd_name][0]}", __package__)
        group: Any = typer.main.get_command(room.app)
        return group.get_command(ctx, cmd_name)


def _overview() -> str:
    lines = "\n\n".join(f"{name}: {text}" for name, (_, text) in _COMMANDS.items())
    return f"Measure a server, the engine or its kernels.\n\n{lines}"


app = typer.Typer(cls=_Rooms, no_args_is_help=True, add_completion=False, help=_overview())


@app.callback()
def _group() -> None:
    """Holds the commands; each has its own options."""
