"""The sources of `init` for the worlds' runs, and what a plain loop makes of the same weights."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tasks import Masked
from torch import Tensor

PREFIX, HEAD = "encoder.", "2.1."
FILE, FOLDER, PICKLE = "source.safetensors", "source", "source.pt"
OPTIONS: dict[str, Any] = {"rename": {PREFIX: ""}, "exclude": f"{HEAD}*"}


def state() -> dict[str, Tensor]:
    """Return weights with names of their own, of which one is in lower precision, and a head of another size."""
    torch.manual_seed(23)
    found = {f"{PREFIX}{name}": value for name, value in Masked().model().state_dict().items()}
    found[f"{PREFIX}1.0.weight"] = found[f"{PREFIX}1.0.weight"].bfloat16()
    return found | {f"{PREFIX}{HEAD}weight": torch.zeros(5, 32), f"{PREFIX}{HEAD}bias": torch.zeros(5)}


def fitting() -> dict[str, Tensor]:
    """Return those of them that are loaded, by the model's names."""
    named = {name.removeprefix(PREFIX): value for name, value in state().items()}
    return {name: value for name, value in named.items() if not name.startswith(HEAD)}


def write(folder: Path) -> None:
    """Write the weights as a file, in two shards with an index, and by torch.save."""
    weights = state()
    save_file(weights, folder / FILE)
    torch.save(weights, folder / PICKLE)
    (folder / FOLDER).mkdir()
    placed = {name: f"model-{place % 2 + 1:05d}-of-00002.safetensors" for place, name in enumerate(weights)}
    for file in set(placed.values()):
        save_file({name: weights[name] for name in weights if placed[name] == file}, folder / FOLDER / file)
    (folder / FOLDER / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
