"""Change a module the moment it has been imported, before its importer sees it.

Modules of Megatron bind functions of other modules by name when they are imported
(``from ... import initialize_megatron``). A patch that is in place when the module's
own body has run reaches all of them, in whatever order they are imported, and costs
no import by itself.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

Patch = Callable[[ModuleType], None]


def after_import(name: str, patch: Patch) -> Callable[[], None]:
    """Call ``patch(module)`` when module ``name`` is imported, at once if it already is.

    Returns:
        A function that cancels this for imports to come; it does not undo the patch.
    """
    module = sys.modules.get(name)
    if module is not None:
        patch(module)
        return lambda: None
    waiting = _finder().patches.setdefault(name, [])
    waiting.append(patch)

    def cancel() -> None:
        if patch in waiting:
            waiting.remove(patch)

    return cancel


class _PatchingFinder(importlib.abc.MetaPathFinder):
    """Finds nothing itself: lets the other finders find, and adds the patches."""

    def __init__(self) -> None:
        self.patches: dict[str, list[Patch]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the spec that the next finder has, with a loader that patches."""
        if fullname not in self.patches:
            return None
        for finder in sys.meta_path:
            if isinstance(finder, _PatchingFinder):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                self._patch_when_run(spec.loader, fullname)
                return spec
        return None

    def _patch_when_run(self, loader: object, fullname: str) -> None:
        """Let this one loader (each module has its own) apply the patches in the end."""
        stock = loader.exec_module  # type: ignore[attr-defined]

        def exec_module(module: ModuleType) -> None:
            stock(module)
            for patch in self.patches[fullname]:
                patch(module)

        loader.exec_module = exec_module  # type: ignore[attr-defined]


def _finder() -> _PatchingFinder:
    """Return the finder of this process, first in the list of finders."""
    for finder in sys.meta_path:
        if isinstance(finder, _PatchingFinder):
            return finder
    finder = _PatchingFinder()
    sys.meta_path.insert(0, finder)
    return finder
