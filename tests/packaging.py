"""The packaging guard: sdist -> wheel -> a bare environment without torch; run as `python -m tests.packaging`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

from tests.bundles import write_bundle

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("resq-harden", "resq-export", "resq-validate", "resq")
ON_DEVICE = ("cli", "engine", "engine_flags", "engine_options", "engine_progress", "on_device")
NEEDS_TORCH = tuple(
    f"resq_deploy.{name}" for name in ("hardening", "networks", "_factories", "checkpoint")
)
BARE = """
import importlib, pkgutil, sys
import resq_deploy
count, torch_only, on_device = 0, {torch_only!r}, {on_device!r}
for module in pkgutil.walk_packages(resq_deploy.__path__, "resq_deploy."):
    count += 1
    name = module.name
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        half = name.startswith(("resq_deploy.export", *torch_only))
        half = half and name not in ["resq_deploy.export." + part for part in on_device]
        if not (half and error.name in ("torch", "torchvision")):
            raise SystemExit(f"{{name}} does not import without {{error.name}}")
assert "torch" not in sys.modules
assert all(name in dir(resq_deploy) for name in resq_deploy.__all__)
print(count)
"""


def _run(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed\n{done.stdout}\n{done.stderr}")
    return done.stdout


def _sources() -> set[str]:
    """Module files of the three folders, as they have to appear in the wheel."""
    found = set()
    for folder, package in (
        ("resq_deploy", "resq_deploy"),
        ("export", "resq_deploy/export"),
        ("runtime", "resq_deploy/runtime"),
    ):
        for path in (ROOT / folder).rglob("*.py"):
            relative = path.relative_to(ROOT / folder)
            if not path.parent.is_symlink() and "__pycache__" not in relative.parts:
                if folder == "resq_deploy" and relative.parts[0] in ("export", "runtime"):
                    continue
                found.add(f"{package}/{relative.as_posix()}")
    return found


def _build_engine(work: Path) -> None:
    """`resq-export BUNDLE` gets, without torch, as far as the engine builder, which is not there."""
    write_bundle(work / "m.resq")
    command = [work / "bare" / "bin" / "resq-export", work / "m.resq", "--target", "tensorrt-rtx"]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd="/")
    if done.returncode != 2 or "pip install 'resq-deploy[tensorrt-rtx]'" not in done.stderr:
        sys.exit(f"resq-export BUNDLE in a bare environment: {done.returncode} {done.stderr}")


def main() -> None:
    """Build, install bare, import from `/`, count the modules, run every command's `--help` there."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        _run(sys.executable, "-m", "build", "--outdir", work / "dist", ROOT)
        (wheel,) = (work / "dist").glob("*.whl")
        inside = {n for n in zipfile.ZipFile(wheel).namelist() if n.endswith(".py")}
        if inside != _sources():
            sys.exit(f"the wheel and the tree differ: {sorted(inside ^ _sources())}")
        venv.create(work / "bare", with_pip=True)
        python = work / "bare" / "bin" / "python"
        _run(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel)
        count = _run(
            python, "-c", BARE.format(torch_only=NEEDS_TORCH, on_device=ON_DEVICE), cwd=Path("/")
        ).strip()
        for command in COMMANDS:
            _run(work / "bare" / "bin" / command, "--help", cwd=Path("/"))
        _build_engine(work)
    print(
        f"packaging: {len(inside)} files in the wheel, {count} modules seen in a bare environment, commands answer"
    )


if __name__ == "__main__":
    main()
