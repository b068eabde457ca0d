"""What is published: a source archive whose wheel installs, and a repository's own files."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

from tests.test_house import ROOT, _copy_of_sources

TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def build(folder: Path) -> tuple[Path, Path]:
    """(sdist, wheel), the wheel made from what the sdist holds."""
    command = [sys.executable, "-m", "build", "--no-isolation", "-o", str(folder / "dist")]
    source = _copy_of_sources(folder / "src")
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    return next((folder / "dist").glob("*.tar.gz")), next((folder / "dist").glob("*.whl"))


def modules() -> set[str]:
    """Every module by its place in a wheel."""
    links = ("kernels", "server", "bench")
    found = {p.relative_to(ROOT) for p in (ROOT / "nsa_serve").rglob("*.py")}
    own = {path.as_posix() for path in found if path.parts[1] not in links}
    linked = {
        f"nsa_serve/{path.relative_to(ROOT).as_posix()}"
        for name in links
        for path in (ROOT / name).rglob("*.py")
    }
    return own | linked


def test_the_wheel_of_the_source_archive_is_whole_and_its_command_runs_anywhere(tmp_path):
    archive, wheel = build(tmp_path)
    held = set(zipfile.ZipFile(wheel).namelist())
    assert modules() <= held
    assert {"nsa_serve/py.typed", "nsa_serve/bench/shapes/8b/config.json"} <= held
    with tarfile.open(archive) as sources:
        tops = {name.split("/")[1] for name in sources.getnames() if "/" in name}
    assert "tests" not in tops  # half of them would be
    assert {"LICENSE", "README.md", "CITATION.cff", "pyproject.toml"} <= tops
    run_installed(wheel, tmp_path)


def run_installed(wheel: Path, folder: Path) -> None:
    """Install the wheel away from the sources and ask its command for help."""
    target = folder / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
         "--no-compile", "--target", str(target), str(wheel)],
        check=True, capture_output=True,
    )  # fmt: skip
    done = subprocess.run(
        [str(target / "bin" / "nsa-serve"), "bench", "serve", "--help"],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(target)},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert "--request-rate" in done.stdout


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_issue_templates_are_forms_that_ask_for_something(path):
    form = yaml.safe_load(path.read_text())
    if path.name == "config.yml":
        assert set(form) == {"blank_issues_enabled"}
        return
    assert {"name", "description", "body"} <= form.keys()
    ids = [part["id"] for part in form["body"]]
    assert len(set(ids)) == len(ids)
    assert any(part.get("validations", {}).get("required") for part in form["body"])


def test_the_citation_names_this_project_and_its_paper():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "license"} <= cited.keys()
    assert cited["references"][0]["url"].endswith("2502.11089")


def test_hooks_run_what_the_check_of_the_repository_runs():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    entries = [hook.get("entry", "") for repo in hooks["repos"] for hook in repo["hooks"]]
    makefile = (ROOT / "Makefile").read_text()
    for tool in ("ruff check", "ruff format", "pytest"):
        assert any(tool in entry for entry in entries)
        assert tool in makefile
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
    steps = [step.get("run") for step in workflow["jobs"]["test"]["steps"]]
    assert "make test" in steps
    assert "make test" in (ROOT / ".ci/run").read_text()
