"""A tiny Llama with an adapter of peft's."""

from typing import Any

import torch
from tasks import VOCABULARY, Masked
from torch import Tensor, nn

from distrib.tasks.adapters import with_adapter

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": VOCABULARY,
    "use_cache": False,
}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "modules_to_save": ["lm_head"]}


def base_model() -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    made: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLAMA), dtype=torch.float32)
    return made


class Adapted(Masked):
    """Trains LoRA and a copy of the output layer."""

    def __init__(self, dropout: float = 0.0, base_dtype: str | None = None) -> None:
        super().__init__()
        self.options = {"type": "lora", **LORA, "alpha": 8, "dropout": dropout, "base_dtype": base_dtype}

    def model(self) -> nn.Module:
        return with_adapter(base_model(), self.options)

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        logits: Tensor = model(input_ids=batch[0]).logits
        return logits.float()
