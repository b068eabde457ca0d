"""The command line: ``nsa-serve serve | run-batch | chat | bench | eval | plan | collect-env``.

Rooms that take long to import (the server, the load test, torch) are imported when their command
runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import __version__
from ..errors import NSAServeError
from .flags import BatchFlags, ServeFlags, refuse, takes_flags

# Commands whose rooms are imported to run them.
_LAZY = {
    "bench": "nsa_serve.bench.cli",
    "eval": "nsa_serve.evaluate.cli",
    "plan": "nsa_serve.bench.plan_cli",
}
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


class _LazyGroup(TyperGroup):
    """Knows benchmarks, evaluations and the planner by name, and imports them to run them.

    What can't be started is told in one line: exit code 2.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except NSAServeError as error:
            raise refuse(error) from None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] in _LAZY:
            command = typer.main.get_command(import_module(_LAZY[args[0]]).app)
            return args[0], command, args[1:]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="nsa-serve",
    cls=_LazyGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"nsa-serve {__version__}\n")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it and end."),
    ] = False,
) -> None:
    """Serve language models with Native Sparse Attention behind OpenAI's API."""


@app.command()
@takes_flags(ServeFlags)
def serve(flags: ServeFlags) -> None:
    """Serve a model at http://127.0.0.1:8000/v1 until told to stop."""
    _end(lambda: import_module("nsa_serve.server.serve").serve(flags))


@app.command("run-batch")
@takes_flags(BatchFlags)
def run_batch(flags: BatchFlags) -> None:
    """Answer a file of requests in OpenAI's batch form. Run again, it goes on where it stopped."""
    _end(lambda: import_module("nsa_serve.server.batch.run").run_batch(flags))


@app.command(context_settings=_PASS_ON)
def chat(
    context: typer.Context,
    url: Annotated[
        str | None,
        typer.Option(help="A running server; without it one is started for this chat."),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="NSA_SERVE_API_KEY", help="Key of the server.", show_default=False),
    ] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy. Default: the server's.", min=0)
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 1024,
) -> None:
    """Talk to a model in the terminal. MODEL and flags of serve start a server for it."""
    room = import_module("nsa_serve.server.terminal_chat")
    settings = room.ChatSettings(system, temperature, max_tokens, api_key)
    _end(lambda: room.chat(url, context.args, settings))


@app.command()
def bench() -> None:
    """Measure a server, the engine or its kernels: see bench --help."""


@app.command("eval")
def evaluate() -> None:
    """Evaluate a model: needles, perplexity, retrieval tasks, chat. See eval --help."""


@app.command()
def plan() -> None:
    """Count the memory that a model and a load need: see plan --help."""


@app.command("collect-env")
def collect_env() -> None:
    """Print versions and hardware, for a report of a problem."""
    sys.stdout.write(import_module("nsa_serve.server.collect_env").report())


def _end(run: Any) -> None:
    """Run to the end of the process, whose exit code ``run`` answers."""
    raise typer.Exit(run())


def main() -> None:
    """Entry point of the installed command."""
    app()


if __name__ == "__main__":
    main()
