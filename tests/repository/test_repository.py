"""The repository keeps its own promises: instructions name what exists, and nothing points at one
person's machine.
"""

import ast
import os
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers_paths import PROJECT_ROOT

MOST_LINES_OF_A_FILE, MOST_LINES_OF_A_FUNCTION = 500, 50
CACHES = {
    ".git",
    "__pycache__",
    ".pytest_cache",
    ".mypy_cache",
    ".ruff_cache",
    ".hypothesis",
    "runs",
    "mlruns",
    "build",
    "dist",
}
# A host of a package registry, or an absolute path (not the tail of one, as in `{folder}/work/`)
# into somebody's home or work folder.
FOREIGN = re.compile(r"pypi[.]org|pythonhosted[.]org|(?<![\w}.)~-])/(?:work|root)/")
COMMANDS = {
    "make",
    "taskpack",
    "python",
    "python3",
    "pip",
    "git",
    "cd",
    "export",
    "mlflow",
    "ray",
    "kubectl",
    "curl",
    "docker",
    "helm",
    "ls",
}


def text_files() -> Iterator[tuple[Path, str]]:
    """Every text file of the working tree, whether git knows it yet or not; environments and caches
    are left out, and so is the file `.git` of a worktree.
    """
    for root, folders, names in os.walk(PROJECT_ROOT):
        folders[:] = [
            name
            for name in folders
            if name not in CACHES
            and not name.endswith(".egg-info")
            and not Path(root, name, "pyvenv.cfg").exists()
        ]
        for path in (Path(root, name) for name in names if name not in CACHES):
            content = path.read_bytes() if path.is_file() else b""
            if b"\0" not in content[:4096]:
                yield path.relative_to(PROJECT_ROOT), content.decode("utf-8", errors="replace")


def readme() -> str:
    path = PROJECT_ROOT / "README.md"
    if not path.exists():
        pytest.skip("there is no README.md yet")
    return path.read_text(encoding="utf-8")


def makefile_targets() -> set[str]:
    return set(
        re.findall(
            r"^([a-z][a-z-]*):",
            (PROJECT_ROOT / "Makefile").read_text(encoding="utf-8"),
            flags=re.MULTILINE,
        )
    )


def shell_commands(markdown: str) -> list[str]:
    """The commands of the fenced `sh` blocks, continuation lines joined, comments and variable
    settings in front left out.
    """
    blocks = re.findall(r"^```sh\n(.*?)^```", markdown, flags=re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [
        re.sub(r"^(?:[A-Z_]+=\S+\s+)+", "", line)
        for line in lines
        if line and not line.startswith("#")
    ]


def test_no_file_points_at_a_registry_host_or_one_persons_folders() -> None:
    files = dict(text_files())
    assert {
        Path("pyproject.toml"),
        Path("Makefile"),
        Path(".ci/run"),
        Path("pipeline/specs/__init__.py"),
    } <= files.keys()
    assert [
        (str(path), match[0]) for path, text in files.items() for match in FOREIGN.finditer(text)
    ] == []


def pins() -> dict[str, str]:
    """The pinned version of each package, by its normalised name."""
    lines = [
        line
        for line in (PROJECT_ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    ]
    assert [
        line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+]+", line)
    ] == []
    pinned = {normalised(name): version for name, version in (line.split("==") for line in lines)}
    assert len(pinned) == len(lines)
    return pinned


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_declared_dependency_is_pinned_at_one_public_version() -> None:
    project = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text(encoding="utf-8"))[
        "project"
    ]
    declared = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {normalised(re.match(r"[A-Za-z0-9._-]+", requirement)[0]) for requirement in declared}  # type: ignore[index]
    assert names <= pins().keys()
    # A local build (`+cpu`) exists on one machine only; installers and the project itself are not
    # the constraints' business.
    assert [name for name, version in pins().items() if "+" in version] == []
    assert not {"pip", "setuptools", "wheel", "taskpack"} & pins().keys()


def test_the_makefile_lists_each_of_its_targets() -> None:
    listed = subprocess.run(
        ["make", "--no-print-directory", "help"],
        cwd=PROJECT_ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert {line.split()[1] for line in listed.splitlines()} == makefile_targets()
    assert {"demo", "test", "lint"} <= makefile_targets()


def test_the_readme_names_only_make_targets_that_exist() -> None:
    made = [
        re.split(r"&&|[;|#]", command)[0]
        for command in shell_commands(readme())
        if command.startswith("make ")
    ]
    assert {
        word for command in made for word in command.split()[1:] if "=" not in word
    } <= makefile_targets()


def test_the_readmes_commands_start_with_a_program_a_reader_has() -> None:
    assert [
        command for command in shell_commands(readme()) if command.split()[0] not in COMMANDS
    ] == []


def too_long(path: Path) -> Iterator[str]:
    """The file and its functions that have more lines than they may."""
    text, name = path.read_text(encoding="utf-8"), path.relative_to(PROJECT_ROOT)
    if (lines := len(text.splitlines())) > MOST_LINES_OF_A_FILE:
        yield f"{name}: {lines} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MOST_LINES_OF_A_FUNCTION:
                yield f"{name}:{node.lineno}: {node.name}: {lines} lines"


def test_no_file_and_no_function_of_the_package_is_too_long() -> None:
    paths = sorted((PROJECT_ROOT / "pipeline").rglob("*.py"))
    assert len(paths) > 100
    assert [offender for path in paths for offender in too_long(path)] == []


def test_every_folder_of_the_catalogue_is_installed() -> None:
    content = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = [path.name for path in (PROJECT_ROOT / "tasks").iterdir() if path.is_dir()]
    expected = {"share/taskpack": ["tasks/*.yaml"]}
    expected |= {f"share/taskpack/{name}": [f"tasks/{name}/*"] for name in sorted(folders)}
    assert content["tool"]["setuptools"]["data-files"] == expected
