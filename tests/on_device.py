"""The on-device guard: base install and the attacks extra, no torch; run as `python -m tests.on_device`.

A bundle is made here, and validated by the commands of a fresh environment: stored attacks are replayed, those that
know the faults under their faults, and the black boxes run.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from resq_deploy.bundle import Bundle
from tests.bundles import write_bundle

ROOT = Path(__file__).resolve().parent.parent
NO_TORCH = """
import importlib.util, sys
found = [name for name in ("torch", "torchvision") if importlib.util.find_spec(name)]
sys.exit(f"{found} in an environment that needs none" if found else 0)
"""


def _run(*command: str | Path) -> None:
    done = subprocess.run(list(map(str, command)), cwd="/", capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed\n{done.stdout}\n{done.stderr}")


def check(bundle: Bundle, report: Path) -> list[str]:
    """Names of the attacks in a report that ran on this bundle; what is missing ends the program."""
    found = json.loads((report / "report.json").read_text(encoding="utf-8"))
    names = [attack["name"] for attack in found["attacks"]]
    known = [joint["name"] for joint in found["joint"]]
    wanted = [n for n, a in bundle.manifest.attacks.items() if a.faulty is None]
    if names[:3] != [*wanted, "square", "hopskipjump"] or known != ["noise@ber=1e-2"]:
        sys.exit(f"ran {names} and {known}")
    crafted = {attack["name"]: attack["crafted_through"] for attack in found["attacks"]}
    if crafted["square"] != "artifact":
        sys.exit("square did not run on the artifact")
    return [*names, *known]


def main() -> None:
    """Install, assert that torch is missing, validate, read the report."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        bundle = write_bundle(work / "m.resq", faulty=True)
        venv.create(work / "device", with_pip=True)
        bin_ = work / "device" / "bin"
        pip = (bin_ / "python", "-m", "pip", "install", "--quiet")
        _run(*pip, "-c", ROOT / "constraints.txt", f"{ROOT}[attacks]")
        _run(bin_ / "python", "-c", NO_TORCH)
        few = ["--ber", "1e-2", "--faults", "", "--trials", "2", "--workers", "1", "--joint"]
        attacks = ["--attack", "noise,square,hopskipjump", "--eps", "8/255", "--quiet"]
        _run(bin_ / "resq-validate", bundle.path, *few, *attacks, "-o", work / "report")
        names = check(bundle, work / "report")
    print(f"on a device without torch: {', '.join(names)} ran")


if __name__ == "__main__":
    main()
