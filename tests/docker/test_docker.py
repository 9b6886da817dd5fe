"""The Dockerfiles, the compose file and their helpers, as far as no engine is needed; docker/test.sh does the rest."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))


def requirements() -> ModuleType:
    spec = importlib.util.spec_from_file_location("requirements", DOCKER / "requirements.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_requirements_open_up_the_packages_own_extras() -> None:
    project: dict[str, Any] = {
        "name": "resq-deploy",
        "dependencies": ["numpy>=2"],
        "optional-dependencies": {
            "a": ["resq-deploy[b, c]", "x"],
            "b": ["y", "resq-deploy[a]"],
            "c": ["x", "resq-other[b]"],
        },
    }
    assert requirements().needs(project, ["a"]) == ["numpy>=2", "x", "y", "resq-other[b]"]


def test_the_runtime_image_gets_no_torch() -> None:
    run = [sys.executable, str(DOCKER / "requirements.py"), str(ROOT / "pyproject.toml")]
    found = subprocess.run(
        [*run, "data", "attacks", "tensorrt-rtx", "cuda"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "onnxruntime" in found.stdout
    assert "torch" not in found.stdout
    assert "tensorrt-rtx" in found.stdout
    for path, extras in {"cpu": "data attacks tensorrt-rtx", "nvidia": "data attacks cuda"}.items():
        text = (DOCKER / f"{path}.Dockerfile").read_text()
        assert f"requirements.py pyproject.toml {extras} > runtime.txt" in text
    with_export = subprocess.run([*run, "export"], capture_output=True, text=True, check=True)
    assert "torchvision" in with_export.stdout


def copies(stage: str) -> list[str]:
    return re.findall(r"^COPY .*$", stage, re.M)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
class TestDockerfile:
    def test_bases_are_arguments_and_pinned(self, path: Path) -> None:
        text = path.read_text()
        bases = re.findall(r"^ARG BASE=(\S+)$", text, re.M)
        assert len(bases) == 1
        assert re.search(r":\S*\d", bases[0])
        assert not bases[0].endswith(":latest")
        stages = set(re.findall(r"^FROM \S+ AS (\S+)$", text, re.M))
        for source in re.findall(r"^FROM (\S+)", text, re.M):
            assert source in stages | {"${BASE}"}

    def test_images_do_not_run_as_root(self, path: Path) -> None:
        for stage in re.split(r"^FROM ", path.read_text(), flags=re.M):
            if re.match(r"\S+ AS (export|runtime)\n", stage):
                assert re.search(r"^USER 1000:1000$", stage, re.M)

    def test_dependencies_are_installed_before_code_is_copied(self, path: Path) -> None:
        for stage in re.split(r"^FROM ", path.read_text(), flags=re.M):
            if re.match(r"\S+ AS \w+-dependencies\n", stage):
                assert all("--from=requirements" in line for line in copies(stage))

    def test_nothing_of_the_host_is_written_into_it(self, path: Path) -> None:
        text = path.read_text()
        assert "index-url" not in text
        assert "PIP_INDEX" not in text
        assert not re.search(r"^ENV .*(CA|CERT|PIP_C)", text, re.M)

    def test_only_sources_reach_the_engine(self, path: Path) -> None:
        lines = path.with_name(f"{path.name}.dockerignore").read_text().splitlines()
        assert lines[1] == "*"
        copied = re.findall(r"^COPY (?!--from)(.+) \S+$", path.read_text(), re.M)
        for name in " ".join(copied).split():
            assert f"!{name}" in lines, name

    def test_the_folders_that_are_copied_exist(self, path: Path) -> None:
        for name in ("export", "runtime", "resq_deploy", "constraints.txt", "LICENSE"):
            assert re.search(rf"^COPY .*\b{re.escape(name)}\b", path.read_text(), re.M)
            assert (ROOT / name).exists()


def test_the_compose_file_names_targets_that_exist() -> None:
    text = (DOCKER / "compose.yaml").read_text()
    for name, target in re.findall(r"dockerfile: docker/(\S+)\n\s+target: (\S+)", text):
        assert re.search(rf"^FROM \S+ AS {target}$", (DOCKER / name).read_text(), re.M)
    assert text.count("dockerfile:") == 5


def test_the_documented_lines_name_images_that_are_built() -> None:
    text = (DOCKER / "README.md").read_text()
    built = set(re.findall(r"-t (resq-deploy:\S+)", text))
    run = set(re.findall(r"^\s+(?:\S.* )?(resq-deploy:[\w-]+) resq-", text, re.M))
    assert run
    assert run <= built


def docker_test(path: str) -> subprocess.CompletedProcess[str]:
    shell = shutil.which("sh")
    assert shell is not None
    environment = {"PATH": path, **{k: v for k, v in os.environ.items() if k == "RESQ_DOCKER"}}
    command = [shell, str(DOCKER / "test.sh")]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def tools(folder: Path, docker: str | None) -> str:
    """A PATH with the few tools the script needs, and `docker` as a script."""
    for name in ("dirname", "sed", "head", "id", "sh"):
        found = shutil.which(name)
        assert found is not None
        (folder / name).symlink_to(found)
    if docker is not None:
        (folder / "docker").write_text(f"#!/bin/sh\n{docker}\n")
        (folder / "docker").chmod(0o755)
    return str(folder)


def test_without_docker_it_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RESQ_DOCKER", raising=False)
    done = docker_test(tools(tmp_path, None))
    assert done.returncode == 0
    assert "not run: there is no docker command" in done.stderr


def test_without_an_engine_it_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tools(tmp_path, "echo 'Cannot connect to the Docker daemon' >&2; exit 1")
    monkeypatch.delenv("RESQ_DOCKER", raising=False)
    done = docker_test(path)
    assert done.returncode == 0
    assert "no Docker engine answers: Cannot connect to the Docker daemon" in done.stderr
    monkeypatch.setenv("RESQ_DOCKER", "required")
    assert docker_test(path).returncode == 1


def test_without_buildkit_it_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RESQ_DOCKER", raising=False)
    docker = 'case "$1" in info) ;; --version) echo "Docker version 28.2.2, build x" ;; *) exit 1 ;; esac'
    done = docker_test(tools(tmp_path, docker))
    assert done.returncode == 0
    assert "docker 28 has no BuildKit" in done.stderr
