"""Launching a script, the import hook, and Megatron's compiled helpers."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("torch")

from megatron_bpipe.integration.bootstrap import dataset_helpers as helpers
from megatron_bpipe.integration.patches import import_hook as hooks

ROOT = Path(__file__).parents[3]
LAUNCH = (
    "import sys\n"
    "import megatron_bpipe.integration.bootstrap.run_script as launch\n"
    "launch.run_script(sys.argv[1], sys.argv[2:])"
)


def launch(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, "-c", LAUNCH, script, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_script_runs_as_main_with_its_arguments_and_folder(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("value = 41")
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, beside\n"
        "assert __name__ == '__main__' and __file__ == sys.argv[0], sys.argv\n"
        "sys.stdout.write(f'{sys.argv[1:]} {beside.value}')\n"
    )
    done = launch(str(script), "--lr", "1e-3")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['--lr', '1e-3'] 41"


def test_missing_script_is_named_once(tmp_path: Path) -> None:
    for rank, said in (("0", True), ("1", False)):
        done = subprocess.run(
            [sys.executable, "-m", "megatron_bpipe", "run", "nowhere/pretrain_gpt.py"],
            env=os.environ | {"PYTHONPATH": str(ROOT), "RANK": rank},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 2
        assert ("no training script at 'nowhere/pretrain_gpt.py'" in done.stderr) is said


def test_modules_are_patched_before_their_importer_sees_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hooked_module.py").write_text("def answer():\n    return 1\n")
    (tmp_path / "importer_module.py").write_text("from hooked_module import answer\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    seen = []

    def patch(module: object) -> None:
        stock = module.answer  # type: ignore[attr-defined]
        module.answer = lambda: stock() + 1  # type: ignore[attr-defined]
        seen.append(module)

    hooks.after_import("hooked_module", patch)
    cancel = hooks.after_import("hooked_module", lambda module: seen.append("cancelled"))
    cancel()
    import importer_module

    assert importer_module.answer() == 2
    assert len(seen) == 1
    hooks.after_import("hooked_module", patch)  # imported already: at once
    assert sys.modules["hooked_module"].answer() == 3


SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


def datasets(root: Path, source: str, compiled: bool) -> Path:
    folder = root / "megatron" / "core" / "datasets"
    folder.mkdir(parents=True)
    (folder / "helpers.cpp").write_text(source)
    if compiled:
        (folder / f"helpers_cpp{SUFFIX}").write_bytes(b"")
    return folder


def test_compiled_helpers_are_its_own_or_those_of_the_same_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = datasets(tmp_path / "checkout", "same", compiled=False)
    other = datasets(tmp_path / "other", "different", compiled=True)
    wheel = datasets(tmp_path / "wheel", "same", compiled=True)
    paths = [str(tmp_path / name) for name in ("checkout", "other", "wheel")]
    monkeypatch.setattr(sys, "path", paths)
    assert helpers.compiled_helpers(other) == other / f"helpers_cpp{SUFFIX}"
    assert helpers.compiled_helpers(checkout) == wheel / f"helpers_cpp{SUFFIX}"
    monkeypatch.setattr(sys, "path", paths[:2])
    assert helpers.compiled_helpers(checkout) is None


def test_a_compilation_that_cannot_work_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    utils = ModuleType("utils")
    utils.__file__ = str(datasets(tmp_path, "source", compiled=False) / "utils.py")
    utils.compile_helpers = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    helpers._patch(utils)
    with monkeypatch.context() as patched:
        patched.setattr(helpers, "missing_build_tools", list)
        with pytest.raises(RuntimeError, match="for another Python than this"):
            utils.compile_helpers()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match=r"make, a C\+\+ compiler missing"):
        utils.compile_helpers()


def test_helpers_of_the_wheel_are_not_compiled_again() -> None:
    pytest.importorskip("megatron.core")
    code = (
        "from megatron_bpipe.integration.bootstrap import dataset_helpers\n"
        "dataset_helpers.install()\n"
        "from megatron.core.datasets.utils import compile_helpers\n"
        "compile_helpers()\n"
        "import megatron.core.datasets.helpers\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
