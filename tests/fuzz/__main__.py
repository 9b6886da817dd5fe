"""Fuzz the readers of outside data with Atheris (libFuzzer): `python -m tests.fuzz [TARGET ...] [--runs N]`.

Each target runs in a process of its own: coverage of resq_deploy steers the mutations, an input that
takes over 10 s or 2 GiB fails, and so does any exception but ResqError, any write outside the target's
folder, any process started, any unpickling. Prints a line a target, and one JSON line at the end.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("manifest", "fault-list", "npz", "onnx", "plan-map", "report", "requirement", "signature")

_PROGRESS = re.compile(r"#\d+\s+(NEW|REDUCE|pulse|INITED|RELOAD)")
_MEMORY = Path("/dev/shm")  # inputs are files: a disk would be what is measured


def one(name: str, runs: int, seed: int) -> None:
    """Run a target in this process; libFuzzer ends it."""
    import atheris  # type: ignore[import-untyped]

    with atheris.instrument_imports(include=["resq_deploy"], enable_loader_override=False):
        from resq_deploy.errors import ResqError
        from tests.fuzz.mutate import mutate_json
        from tests.fuzz.targets import Guard, targets

    folder = Path(
        tempfile.mkdtemp(prefix=f"fuzz-{name}-", dir=_MEMORY if _MEMORY.is_dir() else None)
    )
    target = targets(folder)[name]
    corpus = folder / "corpus"
    corpus.mkdir()
    for index, seed_bytes in enumerate(target.seeds):
        (corpus / str(index)).write_bytes(seed_bytes)
        target_accepts(target.run, seed_bytes, ResqError)

    guard = Guard(folder)

    def test(data: bytes) -> None:
        try:
            with guard:
                target.run(data)
        except ResqError as error:
            if not error.message or len(error.message) > 20_000:
                raise AssertionError("an error that nobody can read") from error

    def mutate(data: bytes, largest: int, seed: int) -> bytes:
        changed = mutate_json(data, seed) if seed % 2 else None
        if changed is None or len(changed) > largest:
            return bytes(atheris.Mutate(data, largest))
        return changed

    limits = ["-timeout=10", "-rss_limit_mb=2048", "-max_len=65536", "-len_control=0"]
    arguments = [f"-runs={runs}", f"-seed={seed}", "-print_final_stats=1", *limits]
    atheris.Setup(
        [name, *arguments, f"-artifact_prefix={folder}/", str(corpus)], test, custom_mutator=mutate
    )
    atheris.Fuzz()


def target_accepts(run: Any, seed: bytes, refused: type[Exception]) -> None:
    """Say so where a seed is refused: fuzzing would start from nothing."""
    try:
        run(seed)
    except refused as error:
        print(f"seed refused: {error}", file=sys.stderr)


def launch(name: str, runs: int, seed: int) -> dict[str, Any]:
    """Run a target in a new process and read libFuzzer's figures."""
    start = time.monotonic()
    command = [sys.executable, "-m", "tests.fuzz", "--one", name, "--runs", str(runs)]
    done = subprocess.run(
        [*command, "--seed", str(seed)], capture_output=True, text=True, check=False
    )
    said = done.stdout + done.stderr
    units = re.search(r"stat::number_of_executed_units:\s*(\d+)", said)
    covered = re.findall(r"cov: (\d+)", said)
    failed = done.returncode != 0
    if failed:
        lines = [x for x in said.splitlines() if not _PROGRESS.match(x)]
        print("\n".join(lines[-60:]), file=sys.stderr)
    return {
        "target": name,
        "inputs": int(units[1]) if units else 0,
        "edges": int(covered[-1]) if covered else 0,
        "failed": failed,
        "seconds": round(time.monotonic() - start, 1),
    }


def main() -> int:
    """Parse, run, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(NAMES))
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        one(given.one, given.runs, given.seed)
        return 0
    found = []
    for name in given.targets or NAMES:
        found.append(launch(name, given.runs, given.seed))
        print(
            "{target}: {inputs:,} inputs, {edges} edges, {seconds} s, failed: {failed}".format_map(
                found[-1]
            )
        )
    print(json.dumps({"fuzz": found}))
    return int(any(f["failed"] or f["inputs"] < given.runs for f in found))


if __name__ == "__main__":
    sys.exit(main())
