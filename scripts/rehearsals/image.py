"""The project's Dockerfile built by buildah on a base made here, and what it holds tried inside.

Started by scripts/rehearse_image.sh. The base stands in for the vendor's image, which needs a
registry: a small Debian, this interpreter, and the torch of this environment, mounted read-only.
Megatron-LM comes from where docker/versions.env says, or from a clone: ``MEGATRON_MIRROR=DIR``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from scripts.rehearsals.common import ROOT, Checks, cannot_run, need, parsed, run_apart

BASE, IMAGE = "localhost/bpipe-base", "localhost/bpipe"
HAVE = "ca-certificates,git,make,g++,procps"
OF_PYTHON = "libffi8,libssl3,zlib1g,libbz2-1.0,liblzma5,libreadline8,libsqlite3-0,libncursesw6"
SITE = "usr/local/lib/python{}.{}/site-packages".format(*sys.version_info)
PACKAGES = Path(sys.prefix, "lib", "python{}.{}".format(*sys.version_info), "site-packages")
MOUNTED = "/base-packages"
NOT_OF_THE_BASE = ("megatron", "__editable__", "__pycache__", "nvidia_", "_virtualenv")
STORAGE = """\
[storage]
driver = "overlay"
graphroot = "{folder}/storage"
runroot = "{folder}/run"
"""
APART = ("--mount", "--pid", "--fork", "--kill-child", "--mount-proc")


def main() -> int:
    """Outside: find out whether it can run, then run where mounts vanish with the process."""
    arguments = parsed(__doc__)
    if arguments.inside is not None:
        return inside(arguments.inside, arguments.report)
    need({"buildah": "buildah", "mmdebstrap": "mmdebstrap", "git": "git", "unshare": "util-linux"})
    repository = os.environ.get("MEGATRON_MIRROR") or versions()["MEGATRON_REPOSITORY"]
    reached = subprocess.run(
        ["git", "ls-remote", repository, "HEAD"], capture_output=True, text=True, check=False,
        env=os.environ | {"GIT_TERMINAL_PROMPT": "0"}, timeout=120,
    )  # fmt: skip
    if reached.returncode:
        last = reached.stderr.strip().splitlines()[-1]
        raise cannot_run(f"no Megatron-LM at {repository} ({last}): MEGATRON_MIRROR names a clone")
    (ROOT / "runs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="image-", dir=ROOT / "runs") as folder:
        words = [sys.executable, "-m", "scripts.rehearsals.image", "--inside", folder]
        if arguments.report is not None:
            words += ["--report", str(arguments.report.resolve())]
        return run_apart(words, APART)


def versions() -> dict[str, str]:
    """Of docker/versions.env."""
    lines = (ROOT / "docker" / "versions.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def inside(folder: Path, report: Path | None) -> int:
    """Make the base, build on it, run what was built."""
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    (folder / "storage.conf").write_text(STORAGE.format(folder=folder))
    os.environ |= {
        "BUILDAH_ISOLATION": "chroot",
        "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
    }
    checks = Checks()
    start = time.monotonic()
    base(folder / "root")
    print(f"base made in {time.monotonic() - start:.0f} s", flush=True)
    start = time.monotonic()
    built, log = build()
    took = f"{time.monotonic() - start:.0f} s with {engine()}"
    checks.add("build", built, took, log)
    doctor = re.findall(r"^--bpipe can(?:not)? run here", log, re.MULTILINE)
    checks.add("doctor", doctor == ["--bpipe can run here"], doctor, log)
    if built:
        quickstart(checks)
        keeps_versions(checks)
    for words in (["rm", "--all"], ["rmi", "--all", "--force"]):
        subprocess.run(["buildah", *words], capture_output=True, check=False)
    return checks.write(report)


def engine() -> str:
    """Its name and version."""
    return " ".join(output("buildah", "--version").split()[:3])


def output(*words: str, seconds: float = 1800) -> str:
    """What a command prints, on either stream."""
    done = subprocess.run(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds
    )
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout[-6000:]}"
        )
    return done.stdout.strip()


def base(root: Path) -> None:
    """A Debian with Python, torch, and what the Dockerfile asks of its base, as an image."""
    named = re.search(r"^VERSION_CODENAME=(\w+)", Path("/etc/os-release").read_text(), re.MULTILINE)
    code = named[1] if named else "stable"
    sources = [str(p) for p in Path("/etc/apt/sources.list.d").glob("debian.sources")]
    sources += [p for p in ("/etc/apt/sources.list",) if Path(p).exists()]
    output(
        "mmdebstrap", "--mode=root", "--variant=minbase", f"--include={HAVE},{OF_PYTHON}",
        code, str(root), *sources[:1],
    )  # fmt: skip
    local = root / "usr" / "local"
    shutil.copytree(sys.base_prefix, local, dirs_exist_ok=True, symlinks=True, ignore=_left_out)
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    for name in ("python", "python3"):
        (local / "bin" / name).unlink(missing_ok=True)
        (local / "bin" / name).symlink_to(version)
    site = root / SITE
    site.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(site)]
    output(*pip, "pip", "setuptools", "wheel", "pybind11")
    for entry in PACKAGES.iterdir():
        if not entry.name.startswith(NOT_OF_THE_BASE) and not (site / entry.name).exists():
            (site / entry.name).symlink_to(f"{MOUNTED}/{entry.name}")
    (root / MOUNTED[1:]).mkdir()
    (root / "mirror").mkdir()
    (root / "etc" / "gitconfig").write_text(
        "[safe]\n\tdirectory = *\n[uploadpack]\n\tallowAnySHA1InWant = true\n"
    )
    output("chroot", str(root), "ldconfig")
    container = output("buildah", "from", "scratch")
    output("buildah", "add", "--quiet", container, str(root), "/")
    output("buildah", "config", "--env", "PYTHONDONTWRITEBYTECODE=1", container)
    output("buildah", "commit", "--quiet", "--format", "docker", container, BASE)
    output("buildah", "rm", container)
    shutil.rmtree(root)


def _left_out(folder: str, names: list[str]) -> set[str]:
    """Of the interpreter: packages somebody installed, its own tests, compiled files."""
    return {n for n in names if n in ("site-packages", "test", "__pycache__", "share", "idlelib")}


def volumes() -> list[str]:
    """What a container sees of this machine."""
    mirror = os.environ.get("MEGATRON_MIRROR")
    mounts = [
        f"{PACKAGES}:{MOUNTED}:ro",
        *([f"{Path(mirror).resolve()}:/mirror:ro"] * bool(mirror)),
    ]
    return [word for mount in mounts for word in ("--volume", mount)]


def build() -> tuple[bool, str]:
    """docker/build.sh as it is, with another base; whether it went well, and its output."""
    words = [str(ROOT / "docker" / "build.sh"), "--tag", IMAGE, "--pull=never", *volumes()]
    words += ["--build-arg", f"BASE_IMAGE={BASE}"]
    if os.environ.get("MEGATRON_MIRROR"):
        words += ["--build-arg", "MEGATRON_REPOSITORY=file:///mirror"]
    done = subprocess.run(
        words, env=os.environ | {"ENGINE": "buildah"}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=3000, check=False,
    )  # fmt: skip
    return done.returncode == 0, done.stdout


def run(container: str, *words: str) -> str:
    """Run a command in it, without a network."""
    return output("buildah", "run", "--network", "none", *volumes(), container, "--", *words)


def quickstart(checks: Checks) -> None:
    """Three iterations with and without BPipe, on the image's Megatron-LM."""
    container = output("buildah", "from", "--pull-never", IMAGE)
    where = run(container, "python", "-c", "import megatron.training as m; print(m.__path__[0])")
    inside_image = where.splitlines()[-1]
    checks.add("Megatron", inside_image.startswith("/opt/Megatron-LM"), inside_image, where)
    script = "/opt/megatron_bpipe/scripts/examples/quickstart.py"
    said = run(container, "env", "GLOO_SOCKET_IFNAME=lo", "python", script, "--iterations", "3")
    same = re.search(r"losses identical: (.*)", said)
    checks.add(
        "quickstart: losses", same and same[1].startswith("yes, bitwise"), same and same[1], said
    )
    output("buildah", "rm", container)


def keeps_versions(checks: Checks) -> None:
    """The list of what must stay has torch in it, so the comparison was one."""
    container = output("buildah", "from", "--pull-never", IMAGE)
    kept = run(container, "cat", "/opt/kept-versions")
    checks.add("kept versions", kept.startswith("torch=="), kept)
    output("buildah", "rm", container)


if __name__ == "__main__":
    sys.exit(main())
