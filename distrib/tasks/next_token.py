"""What tasks that predict the next token of a Hugging Face model share: forward, loss and perplexity."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from distrib.data.documents import NOT_COUNTED
from distrib.errors import ConfigError
from distrib.task import Loss, Task
from distrib.tasks import pretrained


class NextToken(Task):
    """A base class to name before `HuggingFace`. Batches have `input_ids`, `position_ids` and `targets`."""

    auto_class, adapter_task = "AutoModelForCausalLM", "CAUSAL_LM"
    packing: bool  # whether a window may hold several documents, which do not attend to each other

    @staticmethod
    def _checked_packing(packing: Any) -> bool:
        if not isinstance(packing, bool):
            raise ConfigError(f"task.packing: {packing!r}; give true or false")
        return packing

    def _require_fit(self, model: nn.Module) -> None:
        pretrained.require_order(model, self.packing)

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        positions = {"position_ids": batch["position_ids"]} if self.packing else {}
        logits: Tensor = model(input_ids=batch["input_ids"], **positions).logits
        return logits

    def loss(self, output: Tensor, batch: dict[str, Tensor]) -> Loss:
        nats, counted = _nats(output, batch["targets"])
        return Loss(nats.sum(), counted.sum())

    def predict(self, output: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        nats, counted = _nats(output, batch["targets"])
        return {"nats": nats, "tokens": counted}

    def metrics(self, rows: dict[str, Tensor]) -> dict[str, float]:
        return {"perplexity": (rows["nats"].double().sum() / rows["tokens"].sum()).exp().item()}


def _nats(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return each sample's cross-entropy in nats, summed over its counted targets, and their number: (batch,) each."""
    nats = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=NOT_COUNTED, reduction="none")
    return nats.view_as(targets).sum(1), (targets != NOT_COUNTED).sum(1)
