"""The documentation is right: commands run, links are valid, every config key is explained."""

import ast
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from conftest import BLOCK, ROOT, environment
from pydantic import BaseModel

from distrib import Config
from distrib.config_section import keys_of
from distrib.schedule import SCHEDULES
from distrib.schedule_options import Place

PAGES = sorted(
    path for path in ROOT.rglob("*.md") if not any(part.startswith(".") for part in path.parts[len(ROOT.parts) :])
)
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(#[^)\s]*)?\)")


def test_every_command_of_the_readme_runs(mark: str, tmp_path: Path) -> None:
    """`make` is what .ci/run calls."""
    assert run_commands(ROOT / "README.md", mark, tmp_path) >= 5


def test_every_command_of_extending_runs(mark: str, tmp_path: Path) -> None:
    assert run_commands(ROOT / "docs/extending.md", mark, tmp_path) >= 3


def run_commands(page: Path, mark: str, folder: Path) -> int:
    """Run a page's `sh` blocks in order in one folder, with the files that the page shows. Return their number."""
    for name in ("configs", "launch"):
        (folder / name).symlink_to(ROOT / name)
    commands = 0
    for kind, title, text in BLOCK.findall(page.read_text()):
        if title:
            (folder / title).write_text(text)
        elif kind == "sh" and not text.startswith("# not run:"):
            commands += 1
            result = subprocess.run(
                ["bash", "-euc", text], cwd=folder, env=environment(mark), capture_output=True, text=True, timeout=120
            )
            assert result.returncode == 0, f"{text}\n{result.stdout}\n{result.stderr}"
    return commands


def test_distrib_installs_into_an_environment_of_ones_own(mark: str, tmp_path: Path) -> None:
    """Install a copy with the README's command, because building leaves files in the sources. The dependencies are
    installed already."""
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
def test_links_are_valid(page: Path) -> None:
    for target, anchor in LINK.findall(page.read_text()):
        if "://" not in target:
            linked = page.parent / target
            assert linked.exists(), f"{page.relative_to(ROOT)} links to {target}"
            assert not anchor or anchor in anchors(linked), f"{page.relative_to(ROOT)} links to {target}{anchor}"


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", _without_blocks(page), re.MULTILINE)
    return {"#" + re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page: Path) -> None:
    """Paths with a folder in `code`, such as `training/loop.py`, relative to the root, distrib/ or the page's
    folder."""
    if page.parent.name == "results":  # results name files that existed at their time, and files of libraries
        return
    for name in re.findall(r"`((?:[\w-]+/)+[\w-]+\.(?:py|yaml|sbatch|html|js))`", _without_blocks(page)):
        places = [folder / name for folder in (ROOT, ROOT / "distrib", page.parent)]
        assert any(place.exists() for place in places), f"{page.relative_to(ROOT)} names {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_have_a_header(page: Path) -> None:
    """A blank line within a table would leave lines without a header."""
    for table in re.findall(r"(?:^\|.*\n?)+", _without_blocks(page), re.MULTILINE):
        rows = table.splitlines()
        assert len(rows) > 2, f"{page.relative_to(ROOT)}: {rows[0]}"
        assert re.fullmatch(r"[-:| ]+", rows[1]), f"{page.relative_to(ROOT)}: {rows[0]}"


def test_the_map_of_the_code_is_complete() -> None:
    """docs/architecture.md has one line for each non-empty file of distrib/, and no others."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    lines = re.findall(r"^\| `([\w/]+\.\w+)` \| \S.* \|$", page, re.MULTILINE)
    files = [path for path in (ROOT / "distrib").rglob("*") if path.suffix in (".py", ".html", ".js")]
    expected = {path.relative_to(ROOT / "distrib").as_posix() for path in files if path.stat().st_size}
    assert sorted(lines) == sorted(expected)


def test_the_map_has_each_folder() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    files = [*(path for path in PAGES if path.parent != ROOT), *ROOT.glob("[a-z]*/*.py"), *ROOT.glob("[a-z]*/*.yaml")]
    folders = {path.relative_to(ROOT).parts[0] for path in files} - {"runs", "wandb", "build"}
    assert {"examples", "configs", "launch", "slurm", "tests", "benchmarks", "docs"} <= folders
    for folder in folders:
        assert f"`{folder}/`" in page, f"docs/architecture.md has no line for {folder}/"


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_use_public_names_alone(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "distrib":
            public = import_module(str(node.module)).__all__ if node.module in ("distrib", "distrib.data") else []
            if str(node.module).startswith("distrib.tasks."):  # the tasks that come along are there to be derived from
                continue
            for name in node.names:
                assert name.name in public, f"{path.name} imports {name.name} from {node.module}"
        elif isinstance(node, ast.Import):
            names = [name.name for name in node.names if name.name.startswith("distrib")]
            assert names in ([], ["distrib"]), f"{path.name} imports {names}"


def _without_blocks(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_every_config_key_is_explained() -> None:
    page = (ROOT / "docs" / "config.md").read_text()
    for name, field in Config.model_fields.items():
        section = next((c for c in _classes(field.annotation) if issubclass(c, BaseModel)), None)
        keys = [name] if section is None else [f"{name}.{key}" for key in keys_of(section)]
        for key in keys:
            assert f"`{key}`" in page, f"docs/config.md does not explain {key}"


def test_every_schedule_is_explained() -> None:
    page = (ROOT / "docs" / "config.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)`(?: \(.*?\))? \|(.*)$", page.split("\n### Schedules\n")[1], re.MULTILINE))
    for name, schedule in SCHEDULES.items():
        for option in schedule.model_fields:
            assert f"`{option}`" in rows[name], f"docs/config.md does not explain {option} of {name}"
    for key in ("warmup", *Place.model_fields):
        assert f"`{key}`" in page, f"docs/config.md does not explain {key}"


def _classes(annotation: object) -> list[type]:
    if isinstance(annotation, type):
        return [annotation]
    return [inner for inner in getattr(annotation, "__args__", ()) if isinstance(inner, type)]
