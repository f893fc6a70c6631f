"""What the pages promise holds: commands run, links lead somewhere, every config key is explained."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment
from pydantic import BaseModel

from distrib import Config

PAGES = sorted(
    path for path in ROOT.rglob("*.md") if not any(part.startswith(".") for part in path.parts[len(ROOT.parts) :])
)
BLOCK = re.compile(r"^```(\w+)(?: title=(\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(#[^)\s]*)?\)")


def test_every_command_of_the_readme_runs(mark: str, tmp_path: Path) -> None:
    """In order, in one folder, beside the files that the README shows. `make` is what .ci/run calls."""
    for name in ("configs", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    commands = 0
    for kind, title, text in BLOCK.findall((ROOT / "README.md").read_text()):
        if title:
            (tmp_path / title).write_text(text)
        elif kind == "sh" and not text.startswith("# not run:"):
            commands += 1
            result = subprocess.run(
                ["bash", "-euc", text], cwd=tmp_path, env=environment(mark), capture_output=True, text=True, timeout=120
            )
            assert result.returncode == 0, f"{text}\n{result.stdout}\n{result.stderr}"
    assert commands >= 5


def test_distrib_installs_into_an_environment_of_ones_own(mark: str, tmp_path: Path) -> None:
    """The README's command, on a copy: building leaves files beside the sources. What distrib depends on is here."""
    for name in ("pyproject.toml", "README.md", "LICENSE", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "distrib", tmp_path / "distrib", ignore=shutil.ignore_patterns("__pycache__"))
    (command,) = re.findall(r"^\$ pip (install .*) \.$", (ROOT / "README.md").read_text(), re.MULTILINE)
    own = environment(mark, PYTHONPATH=str(tmp_path / "own"))
    pip = [sys.executable, "-m", "pip", *command.split(), "--quiet", "--no-deps", "--target", tmp_path / "own"]
    subprocess.run([*pip, "."], cwd=tmp_path, env=own, check=True, timeout=300)
    program = "import distrib, pathlib; print(pathlib.Path(distrib.__file__).parent)"
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path / "own", env=own, stdout=subprocess.PIPE, text=True
    )
    installed, here = Path(found.stdout.strip()), ROOT / "distrib"
    assert installed == tmp_path / "own" / "distrib"
    assert {p.relative_to(installed) for p in installed.rglob("*") if p.suffix != ".pyc" and p.is_file()} == {
        p.relative_to(here) for p in here.rglob("*") if p.suffix != ".pyc" and p.is_file()
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target, _ in LINK.findall(page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


def test_every_config_key_is_explained() -> None:
    page = (ROOT / "docs" / "config.md").read_text()
    for name, field in Config.model_fields.items():
        section = next((c for c in _classes(field.annotation) if issubclass(c, BaseModel)), None)
        keys = [name] if section is None else [f"{name}.{key}" for key in section.model_fields]
        for key in keys:
            assert f"`{key}`" in page, f"docs/config.md does not explain {key}"


def _classes(annotation: object) -> list[type]:
    if isinstance(annotation, type):
        return [annotation]
    return [inner for inner in getattr(annotation, "__args__", ()) if isinstance(inner, type)]
