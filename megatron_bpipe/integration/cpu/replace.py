"""The one way in which the CPU backend puts a stand-in in a module's place."""

from types import ModuleType


def replace(owner: ModuleType | type, **standins: object) -> None:
    """Set each stand-in on ``owner`` where torch has that name.

    Names that this release of torch lacks stay absent: code that probes with
    ``hasattr`` must see the release as it is.
    """
    for name, standin in standins.items():
        if hasattr(owner, name):
            setattr(owner, name, standin)
