"""The public names for data. They are imported when first used, because some modules here do without torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distrib.data.mixture import Mixture as Mixture
    from distrib.data.order import sample_indices as sample_indices
    from distrib.data.shards import ShardedStream as ShardedStream

_HOME = {
    "Mixture": "distrib.data.mixture",
    "ShardedStream": "distrib.data.shards",
    "sample_indices": "distrib.data.order",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'distrib.data' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
