"""The public names for data. They are imported when first used, because some modules here do without torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distrib.data.mixture import Mixture as Mixture
    from distrib.data.order import sample_indices as sample_indices
    from distrib.data.rows import Columns as Columns
    from distrib.data.rows import Row as Row
    from distrib.data.rows import RowError as RowError
    from distrib.data.rows import encoded_rows as encoded_rows
    from distrib.data.rows import find_files as find_files
    from distrib.data.shards import ShardedStream as ShardedStream

_HOME = {
    "Columns": "distrib.data.rows",
    "Mixture": "distrib.data.mixture",
    "Row": "distrib.data.rows",
    "RowError": "distrib.data.rows",
    "ShardedStream": "distrib.data.shards",
    "encoded_rows": "distrib.data.rows",
    "find_files": "distrib.data.rows",
    "sample_indices": "distrib.data.order",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'distrib.data' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
