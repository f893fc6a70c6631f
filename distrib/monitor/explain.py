"""`distrib explain`: the run plan as a table."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from distrib.config import Config
from distrib.config_yaml import one_line
from distrib.monitor.rate_plot import plot
from distrib.plan import RunPlan


def print_plan(config: Config, strategy: str, plan: RunPlan, optimizer: str, rate: Callable[[int], float]) -> None:
    """Print every derived number with its arithmetic. `optimizer`: its description; `rate`: the first group's rate of
    an update."""
    console = Console(highlight=False, soft_wrap=True)
    table = Table(show_header=False, box=None, title=f"{config.name} on {plan.world_size} process(es), {strategy}")
    table.title_justify = "left"
    rows = {
        "samples a step": f"{plan.global_batch_size} (global_batch_size)",
        "micro-batches a step": (
            f"{plan.num_micro_batches} = {plan.global_batch_size} / {plan.micro_batch_size} (micro_batch_size)"
        ),
        "of which each rank computes": (
            f"{plan.grad_accum_steps} = {plan.num_micro_batches} / {plan.world_size} (grad_accum_steps)"
        ),
        "samples a step, a rank": f"{plan.grad_accum_steps * plan.micro_batch_size}",
        "training samples": "a stream, each rank its own",
        "steps": f"{plan.num_steps:,}",
        "optimizer": optimizer,
        "learning rate": "  ".join(
            f"step {step:,}: {lr:.3g}" for step, lr in plan.learning_rate_samples(config, rate).items()
        ),
    }
    if not console.options.ascii_only:
        rows["over the run"] = plot(rate, plan.num_steps, plan.landmarks(config))
    if plan.num_samples is not None:
        epochs = plan.num_steps * plan.global_batch_size / plan.num_samples
        rows["training samples"] = f"{plan.num_samples:,}"
        rows["steps"] = f"{plan.num_steps:,} = {epochs:.2f} epochs of {plan.num_samples / plan.global_batch_size:.2f}"
    if plan.memory is not None:
        frozen = f", {plan.memory.frozen:,} frozen" if plan.memory.frozen else ""
        rows["parameters"] = f"{plan.memory.trained:,} trained{frozen}"
        rows["parameters, a rank"] = f"{plan.memory.parameters:,} bytes"
        rows["gradients, a rank"] = f"{plan.memory.gradients:,} bytes"
        rows["optimizer state, a rank"] = f"{plan.memory.optimizer_state:,} bytes"
        if config.train.ema is not None:
            rows["average of the weights, a rank"] = f"{plan.memory.average:,} bytes"
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    for doubt in plan.doubts(config):
        console.print(f"warning: {doubt}", markup=False)


def print_sources(sources: Sequence[tuple[str, Any, str]]) -> None:
    """Print which file, or the command line, set a key. Defaults are not listed."""
    table = Table(box=None, title="set by files and the command line", title_justify="left")
    for heading in ("key", "value", "from"):
        table.add_column(heading, justify="left")
    for key, value, source in sources:
        cells = (key, json.dumps(value, ensure_ascii=False), source)
        table.add_row(*(Text(one_line(cell)) for cell in cells))
    Console(highlight=False, soft_wrap=True).print(table)
