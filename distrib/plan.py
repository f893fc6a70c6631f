"""Config and number of processes in, every derived number out: computed once, printed by `distrib explain`."""

from collections.abc import Callable
from dataclasses import dataclass

from distrib.config import Config
from distrib.errors import ConfigError

_POSITIONS = 2**63  # of samples in a run, see data/order.py
_MOST_SAMPLES = 8  # of the learning rate where it bends
_LOOKED_AT = 100_000  # sizes on either side of one that does not divide


@dataclass(frozen=True)
class Memory:
    """Bytes that the fullest rank holds between two steps, or for gradients, at the end of a window. And the numbers of
    trained and frozen elements."""

    parameters: int
    gradients: int
    optimizer_state: int  # with the fp32 copy that ZeRO's stages 1 to 3 update
    average: int = 0  # of the weights, with train.ema
    trained: int = 0  # elements, over all ranks
    frozen: int = 0  # elements, over all ranks


@dataclass(frozen=True)
class BatchPlan:
    """How the samples of a step fall to micro-batches and ranks."""

    world_size: int
    global_batch_size: int
    micro_batch_size: int
    num_micro_batches: int  # a step, over all ranks
    grad_accum_steps: int  # micro-batches a step, on one rank

    @staticmethod
    def of(config: Config, world_size: int) -> "BatchPlan":
        """Raises ConfigError if they don't divide."""
        grad_accum_steps, data = window_size(config, world_size), config.data
        num_micro_batches = grad_accum_steps * world_size
        return BatchPlan(world_size, data.global_batch_size, data.micro_batch_size, num_micro_batches, grad_accum_steps)


@dataclass(frozen=True)
class RunPlan(BatchPlan):
    """The arithmetic of a run."""

    num_samples: int | None  # in the training set; None: it is a stream
    num_steps: int
    warmup_steps: int
    memory: Memory | None = None  # counted where somebody wants to know, see Strategy.memory

    @classmethod
    def create(cls, config: Config, world_size: int, num_samples: int | None) -> "RunPlan":
        """Raises ConfigError where the numbers do not fit together."""
        return cls.complete(config, BatchPlan.of(config, world_size), num_samples)

    @classmethod
    def complete(cls, config: Config, batches: BatchPlan, num_samples: int | None) -> "RunPlan":
        """Raises ConfigError where the length of the run and the number of samples do not fit together."""
        data, train = config.data, config.train
        if num_samples is None and train.steps is None:
            raise ConfigError("train.epochs: the training set is a stream, which has no length; give train.steps")
        if num_samples is not None and num_samples < data.global_batch_size:
            raise ConfigError(
                f"data.global_batch_size: {data.global_batch_size}, but the training set has only {num_samples} "
                f"samples; give at most {num_samples}"
            )
        if train.steps is not None:
            num_steps = train.steps
        else:
            assert train.epochs is not None, "the config has one of the two"
            assert num_samples is not None, "refused above"
            num_steps = -(-train.epochs * num_samples // data.global_batch_size)
        if num_steps * data.global_batch_size >= _POSITIONS:
            raise ConfigError(
                f"train: {num_steps} steps of {data.global_batch_size} samples are more than 2**63 samples; give fewer"
            )
        config.optim.curve(num_steps)  # refuses a schedule that does not fit
        return cls(
            **vars(batches), num_samples=num_samples, num_steps=num_steps, warmup_steps=config.optim.warmup_steps
        )

    def doubts(self, config: Config) -> list[str]:
        """What is allowed and seldom meant, one line each."""
        doubts = []
        if config.optim.lr == 0:
            doubts.append("optim.lr: 0, so that no step changes a weight")
        if self.warmup_steps >= self.num_steps:
            doubts.append(
                f"optim.warmup_steps: {self.warmup_steps}, and the run has {self.num_steps} steps: the learning rate "
                "never reaches optim.lr"
            )
        ema = config.train.ema
        if ema is not None and ema.start_step + ema.every_steps > self.num_steps:
            doubts.append(
                f"train.ema: the first average would be made at update {ema.start_step + ema.every_steps}, and the run "
                f"has {self.num_steps} steps: the average stays what it begins with"
            )
        return doubts

    def epoch(self, step: int) -> int:
        """The epoch in which the first sample of `step` lies; a stream has one."""
        return 0 if self.num_samples is None else step * self.global_batch_size // self.num_samples

    def learning_rate_samples(self, config: Config, rate: Callable[[int], float] | None = None) -> dict[int, float]:
        """The learning rate at the first, last and half-way step, and where the schedule bends, but seldom more than
        so many. `rate`: of an update; by default the config's."""
        factor = config.optim.curve(self.num_steps).factor
        steps = sorted({0, *self.landmarks(config)[:_MOST_SAMPLES], self.num_steps // 2, self.num_steps - 1})
        of = rate or (lambda step: config.optim.lr * factor(step))
        return {step: of(step) for step in steps}

    def landmarks(self, config: Config) -> list[int]:
        """The updates at which the config's schedule bends, the end of the warmup among them."""
        bends = {self.warmup_steps, *config.optim.curve(self.num_steps).landmarks}
        return [step for step in sorted(bends) if 0 <= step < self.num_steps]


def window_size(config: Config, world_size: int) -> int:
    """grad_accum_steps: the micro-batches of a step that fall to one rank. Raises ConfigError if they don't divide."""
    batch, micro = config.data.global_batch_size, config.data.micro_batch_size
    if batch % micro:
        below, above = batch // micro * micro, -(-batch // micro) * micro
        batches = " or ".join(str(size) for size in (below, above) if size)
        raise ConfigError(
            f"data.global_batch_size: {batch} is not a multiple of data.micro_batch_size: {micro}; nearest that fit: "
            f"global_batch_size {batches}{_or_micro_batch_size(batch, micro)}"
        )
    micro_batches = batch // micro
    if micro_batches % world_size:
        per_step = micro * world_size
        batches = " or ".join(
            str(size) for size in (batch // per_step * per_step, -(-batch // per_step) * per_step) if size
        )
        smaller = "" if batch % world_size else _or_micro_batch_size(batch // world_size, micro)
        raise ConfigError(
            f"data: a step has {micro_batches} micro-batches ({batch} / {micro}), which {world_size} processes cannot "
            f"share evenly; nearest that fit: global_batch_size {batches}{smaller}"
        )
    return micro_batches // world_size


def _or_micro_batch_size(samples: int, micro: int) -> str:
    """`, or micro_batch_size N`: the divisor of `samples` that is nearest to `micro`, if it is not far."""
    for distance in range(_LOOKED_AT):
        for size in (micro - distance, micro + distance):
            if 0 < size <= samples and samples % size == 0:
                return f", or micro_batch_size {size}"
    return ""
