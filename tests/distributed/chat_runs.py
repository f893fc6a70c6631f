"""The program that `distrib launch` runs on each rank for test_chat_runs: `chat_runs.py FOLDER`. It makes all runs that
the tests check, and goes on with some after an interruption."""

import sys
from pathlib import Path
from typing import Any

from distrib import Config, Trainer, World
from distrib.training import build

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

STEPS, EVERY = 30, 21
BATCH, MICRO = 4, 1
LENGTH = 150
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "tie_word_embeddings": True,
}
CHAT = {
    "target": "distrib.tasks.chat:Chat",
    "model": LLAMA,
    "tokenizer": "tokenizer",
    "files": "chats.jsonl",
    "eval_files": "few-chats.jsonl",
    "context_length": LENGTH,
}
TASKS: dict[str, dict[str, Any]] = {
    "packed": CHAT,
    "alone": {**CHAT, "packing": False, "truncation": "left", "context_length": 60},
    "dpo": {
        **CHAT,
        "target": "dpo:DPO",
        "files": "pairs.jsonl",
        "eval_files": "few-pairs.jsonl",
        "context_length": 250,
    },
}
RATES = {"packed": 0.5, "alone": 0.5, "dpo": 0.5}  # of SGD: Adam would hide a wrong scale of the gradient
STRATEGIES = {
    1: {"packed": ("single",), "alone": ("single",), "dpo": ("single",)},
    2: {"packed": ("ddp", "zero2", "zero3", "fsdp2"), "alone": ("ddp",), "dpo": ("ddp", "zero2", "fsdp2")},
    4: {"packed": ("ddp",), "dpo": ("ddp",)},
}
RESUMED = [*(("packed", name) for name in STRATEGIES[2]["packed"]), ("dpo", "zero2"), ("dpo", "fsdp2")]  # on two


def values(task: str, strategy: str) -> dict[str, Any]:
    config: dict[str, Any] = {
        "seed": 7,
        "task": TASKS[task],
        "data": {"global_batch_size": BATCH, "micro_batch_size": MICRO},
        "optim": {"name": "sgd", "lr": RATES[task]},
        "train": {"steps": STEPS},
        "strategy": {"name": strategy},
        "checkpoint": {"every_steps": EVERY, "keep": 9},
    }
    if strategy == "zero3":  # by default each engine keeps a bucket of 2 GB
        config["strategy"]["deepspeed"] = {"zero_optimization": {"reduce_bucket_size": 10**6}}
    return config


def train(task: str, strategy: str, folder: Path) -> None:
    config = Config.from_dict(values(task, strategy))
    Trainer(build.task(config), config, folder).fit()


def make_runs(folder: Path) -> None:
    world = World.detect()
    for task, strategies in STRATEGIES[world.world_size].items():
        for strategy in strategies:
            run, resumed = folder / f"{task}-{strategy}", folder / f"{task}-{strategy}-resumed"
            train(task, strategy, run)
            if (task, strategy) in RESUMED and world.world_size == 2:
                if world.is_rank_0:
                    from conftest import interrupted  # which imports much, and the other ranks do without

                    interrupted(run, resumed, after=EVERY)
                world.barrier()
                train(task, strategy, resumed)


if __name__ == "__main__":
    make_runs(Path(sys.argv[1]))
