"""The house rules that no type checker sees: packages, one-way imports, file sizes, the public names."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import resq_deploy

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
HALVES = {"export", "runtime"}


def _modules() -> dict[str, Path]:
    found = {}
    halves = [path for half in HALVES for path in (ROOT / half).rglob("*.py")]
    for path in sorted([*ROOT.glob("resq_deploy/**/*.py"), *halves]):
        relative = path.relative_to(ROOT)
        if relative.parts[0] in HALVES:
            relative = Path("resq_deploy") / relative
        elif relative.parts[1] in HALVES:
            continue
        parts = relative.with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _modules()


def _imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if name.startswith("resq_deploy")}


def test_every_package_is_listed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    on_disk = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    assert on_disk == set(settings["packages"])


@pytest.mark.parametrize("half", sorted(HALVES))
def test_the_two_halves_are_links_and_flat(half: str) -> None:
    link = ROOT / "resq_deploy" / half
    assert link.is_symlink()
    assert str(link.readlink()) == f"../{half}"
    assert not [p for p in (ROOT / half).iterdir() if p.is_dir() and p.name != "__pycache__"]


@pytest.mark.parametrize(
    ("below", "above"),
    [
        ("core", ("resq_deploy.export", "resq_deploy.runtime", "resq_deploy.hardening")),
        ("resq_deploy.runtime", ("resq_deploy.export", "resq_deploy.hardening")),
        ("resq_deploy.hardening", ("resq_deploy.export", "resq_deploy.runtime")),
        ("resq_deploy.export", ("resq_deploy.hardening",)),
    ],
)
def test_imports_run_one_way(below: str, above: tuple[str, ...]) -> None:
    upper = ("resq_deploy.export", "resq_deploy.runtime", "resq_deploy.hardening")
    wrong = []
    for name, path in MODULES.items():
        core = (
            not name.startswith(upper) and name != "resq_deploy"
        )  # the public API reaches up, on first use
        if core if below == "core" else name.startswith(below):
            wrong += [f"{name} imports {used}" for used in _imports(path) if used.startswith(above)]
    assert wrong == []


def test_runtime_and_base_import_no_torch() -> None:
    code = (
        "import sys, resq_deploy, resq_deploy.runtime, resq_deploy.runtime.cli, resq_deploy.runtime.validate;"
        "sys.exit('torch' in sys.modules or 'resq_deploy.export' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("name", MODULES)
def test_files_stay_short(name: str) -> None:
    assert len(MODULES[name].read_text(encoding="utf-8").splitlines()) <= 360


@pytest.mark.parametrize("name", resq_deploy.__all__)
def test_public_names_resolve(name: str) -> None:
    assert getattr(resq_deploy, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = resq_deploy.nothing_of_the_kind


def test_version_is_the_distributions() -> None:
    assert (
        resq_deploy.__version__
        == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    )
