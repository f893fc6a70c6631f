"""Chooses the order in which a run reads its samples, and checks the weights that a task gives them."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from distrib.config import Config
from distrib.data.limit import Limited, chosen
from distrib.data.mixture import Mixture
from distrib.data.order import Order
from distrib.data.shapes import describe
from distrib.data.shards import MOST_SHARDS, ShardedStream
from distrib.data.weights import MOST_WEIGHTS, Weighted
from distrib.errors import ConfigError


def order(dataset: Dataset[Any], weights: NDArray[np.float64] | None, config: Config) -> Order | None:
    """Return the order of a training set; None for a stream. `weights`: as `check_weights` returns them.

    Raises ConfigError.
    """
    limit, seed, name = config.data.limit, config.seed, type(dataset).__name__
    if isinstance(dataset, IterableDataset | Mixture):
        if limit is not None:
            kind = "a Mixture" if isinstance(dataset, Mixture) else f"a stream ({name})"
            raise ConfigError(
                f"data.limit: {limit}, but the training set is {kind}; leave it out, and give fewer train.steps"
            )
        if isinstance(dataset, ShardedStream):
            _check_shards(dataset, config)
        return dataset.order(seed) if isinstance(dataset, Mixture) else None
    size = len(dataset)  # type: ignore[arg-type]
    if limit is None or limit >= size:
        return Order(size, seed) if weights is None else Weighted(weights, seed)
    if weights is None:
        return Limited(Order(limit, seed), size)
    own = weights[chosen(np.arange(limit, dtype=np.uint64), size, seed).astype(np.int64)]
    if not own.any():
        raise ConfigError(f"data.limit: {limit}, and the weights of all samples that it leaves are 0; give more")
    return Limited(Weighted(own, seed), size)


def check_weights(value: Any, dataset: Dataset[Any]) -> NDArray[np.float64] | None:
    """Return what sample_weights returned as an array; None for no weights. Raises ConfigError."""
    if value is None:
        return None
    name = type(dataset).__name__
    if isinstance(dataset, IterableDataset):
        raise ConfigError(
            f"task.sample_weights: {name} is a stream, whose samples cannot be drawn by weights; return None"
        )
    if isinstance(dataset, Mixture):
        raise ConfigError("task.sample_weights: train_dataset() is a Mixture, which has its own weights; return None")
    size = len(dataset)  # type: ignore[arg-type]
    wanted = f"return one number for each of the {size} samples"
    try:
        numbers = value.detach().cpu().double().numpy() if isinstance(value, Tensor) else np.asarray(value)
        weights: NDArray[np.float64] = numbers.astype(np.float64, casting="same_kind" if numbers.size else "unsafe")
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"task.sample_weights: returned {describe(value)}; {wanted}") from None
    if weights.ndim != 1:
        raise ConfigError(f"task.sample_weights: returned {describe(value)}; {wanted}")
    if len(weights) != size:
        raise ConfigError(f"task.sample_weights: returned {len(weights)} weights; {wanted}")
    if size > MOST_WEIGHTS:
        raise ConfigError(
            f"task.sample_weights: {size} weights are too many; at most {MOST_WEIGHTS} samples can have some"
        )
    if (wrong := np.flatnonzero(~((weights >= 0) & np.isfinite(weights)))).size:
        first = int(wrong[0])
        raise ConfigError(f"task.sample_weights: weight {first} is {weights[first]:g}; give finite numbers, 0 or more")
    if not weights.any():
        raise ConfigError("task.sample_weights: all weights are 0; give at least one sample a weight above 0")
    return weights


def _check_shards(stream: ShardedStream, config: Config) -> None:
    name, shards = f"task.train_dataset: {type(stream).__name__}", stream.shards()
    if not isinstance(shards, Sequence) or isinstance(shards, str) or not all(isinstance(one, str) for one in shards):
        raise ConfigError(f"{name}.shards() returned {describe(shards)}; return a list of names, one for each shard")
    if twice := next((one for one, count in Counter(shards).items() if count > 1), None):
        raise ConfigError(f"{name}.shards() has {twice!r} twice; give each shard its own name")
    if len(shards) > MOST_SHARDS:
        raise ConfigError(f"{name} has {len(shards)} shards; give at most {MOST_SHARDS}")
    micro_batches = config.data.global_batch_size // config.data.micro_batch_size
    if len(shards) < micro_batches:
        raise ConfigError(
            f"{name} has {len(shards)} shard(s), but a step has {micro_batches} micro-batches, each of which reads "
            f"shards of its own; give at least {micro_batches} shards, or a larger data.micro_batch_size"
        )
