"""The house keeps its own rules: who may import whom, what a wheel contains, what files hold."""

import ast
import os
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "nsa_serve"
LINKS = ("kernels", "server", "bench")

# Room -> rooms of nsa_serve it may import. A room is the first name below nsa_serve.
PURE = {"errors", "request", "config", "stats", "schedule", "cache"}
ALLOWED = {
    "errors": set(),
    "request": {"errors"},
    "config": {"errors"},
    "stats": {"request"},
    "cache": {"errors", "request", "config"},
    "schedule": {"cache", "request", "config", "errors", "stats"},
    "kernels": set(),
    "memory": {"kernels", "schedule", "config", "errors", "models"},
    "models": {"kernels", "config", "errors"},
    "tokenizer": {"config", "errors", "models"},
    "runner": {
        "models", "memory", "parallel", "kernels", "schedule", "request", "config", "errors",
    },
    "parallel": {"config", "errors"},
    "engine": {
        "schedule", "cache", "runner", "tokenizer", "request", "config", "errors", "stats",
        "models",
    },
    "llm": {"engine", "tokenizer", "request", "config", "errors"},
    "train": {"llm", "models", "tokenizer", "kernels", "request", "config", "errors"},
    "evaluate": {
        "llm", "engine", "models", "train", "server", "request", "config", "errors",
    },
    "server": {"engine", "tokenizer", "request", "config", "errors", "stats", "models"},
}  # fmt: skip
TORCH_FREE = PURE
SERVER_ONLY = {"fastapi", "pydantic", "prometheus_client", "starlette", "uvicorn"}


def python_files() -> Iterator[tuple[str, Path]]:
    """(room, file) of every source file; linked rooms under the name they are imported by."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).parts
        if parts[0] not in LINKS:
            yield parts[0].removesuffix(".py"), path
    for link in LINKS:
        for path in sorted((ROOT / link).rglob("*.py")):
            yield link, path


def module_of(room: str, path: Path) -> list[str]:
    base = ROOT if room in LINKS else PACKAGE
    parts = list(path.relative_to(base).with_suffix("").parts)
    return ["nsa_serve", *parts]


def imports(room: str, path: Path) -> Iterator[str]:
    """Absolute names of the modules that a file imports."""
    module = module_of(room, path)
    package = module[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            anchor = package[: len(package) - node.level + 1] if node.level else []
            base = [*anchor, *(node.module.split(".") if node.module else [])]
            yield ".".join(base)
            yield from (".".join([*base, alias.name]) for alias in node.names)


def rooms_imported(room: str, path: Path) -> set[str]:
    found = set()
    for name in imports(room, path):
        parts = name.split(".")
        if parts[0] == "nsa_serve" and len(parts) > 1:
            found.add(parts[1])
    return found


KNOWN_ROOMS = {*ALLOWED, "bench"}


@pytest.mark.parametrize(("room", "path"), list(python_files()), ids=lambda v: str(v)[-60:])
def test_imports_follow_the_direction_of_the_house(room: str, path: Path) -> None:
    if room in ("bench", "__init__"):
        return  # Benchmarks measure every room; the package's root offers the public names.
    extra = (rooms_imported(room, path) & KNOWN_ROOMS) - ALLOWED[room] - {room}
    if path.name == "cli.py":
        extra.discard("bench")
    assert not extra, f"{path} must not import {sorted(extra)}"


@pytest.mark.parametrize(("room", "path"), list(python_files()), ids=lambda v: str(v)[-60:])
def test_libraries_stay_in_their_rooms(room: str, path: Path) -> None:
    tops = {name.split(".")[0] for name in imports(room, path)}
    if room in TORCH_FREE:
        assert not tops & {"torch", "triton", "numpy"}
    if room != "server":
        assert not tops & SERVER_ONLY
    if room not in ("kernels", "bench"):
        assert "triton" not in tops
    assert not tops & {"pickle", "marshal", "shelve", "dill", "cloudpickle"}


KERNEL_ROOMS = ("reference", "gpu", "training")


# An id of "gpu" alone would read as the marker.
@pytest.mark.parametrize("room", KERNEL_ROOMS, ids="kernels/{}".format)
def test_kernels_of_training_and_serving_meet_in_dispatch(room: str) -> None:
    foreign = {"reference": {"gpu", "training"}, "gpu": {"training"}, "training": {"gpu"}}[room]
    for path in sorted((ROOT / "kernels" / room).rglob("*.py")):
        names = set(imports("kernels", path))
        rooms = {".".join(name.split(".")[:3]) for name in names}
        assert not rooms & {f"nsa_serve.kernels.{other}" for other in foreign}, path
        assert room == "gpu" or "triton" not in {name.split(".")[0] for name in names}, path


@pytest.mark.parametrize("module", sorted(f"nsa_serve.{room}" for room in TORCH_FREE))
def test_deciding_rooms_load_without_torch(module: str) -> None:
    code = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_package_loads_without_torch_and_kernels_without_triton() -> None:
    code = "import nsa_serve, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    for module in ("dispatch", "training.attention"):
        code = f"import nsa_serve.kernels.{module}, sys; sys.exit('triton' in sys.modules)"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_linked_rooms_are_symbolic_links_in_the_repository() -> None:
    for link in LINKS:
        path = PACKAGE / link
        assert path.is_symlink()
        assert os.readlink(path) == f"../{link}"


def test_wheel_holds_nothing_but_nsa_serve(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(tmp_path)],
        cwd=_copy_of_sources(tmp_path / "src"),
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"nsa_serve"}
    for expected in (
        "kernels/gpu/kv_write.py",
        "server/cli.py",
        "server/static/index.html",
        "server/static/main.js",
        "engine/engine.py",
        "py.typed",
    ):
        assert f"nsa_serve/{expected}" in names


def _copy_of_sources(target: Path) -> Path:
    """What git would hand out, so that the build leaves no trace in the working tree."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split("\n")  # fmt: skip
    for name in filter(None, listed):
        source, copy = ROOT / name, target / name
        if source.is_symlink() or source.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            if source.is_symlink():
                copy.symlink_to(os.readlink(source))
            else:
                copy.write_bytes(source.read_bytes())
    return target


def test_version_is_stated_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" in project.get("dynamic", [])
