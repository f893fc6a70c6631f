"""The training step: forward, loss, zero_grad, backward, optimizer step."""

from distrib.data.loader import Window
from distrib.task import Task
from distrib.training.engine import Engine
from distrib.training.step_log import PendingStep


def train_step(engine: Engine, task: Task, window: Window, lr: float) -> PendingStep:
    """Make one optimizer step over a window of micro-batches. Gradients are reduced with the last micro-batch."""
    for index, batch in enumerate(window):
        with engine.microbatch(window, index):
            batch = engine.to_device(batch)
            output = task.forward(engine.model, batch)  # 1. forward pass
            loss = task.loss(output, batch)  # 2. loss
            if index == 0:
                engine.zero_grad()  # 3. clear the old gradients
            engine.backward(loss)  # 4. backpropagation
    return engine.step(lr)  # 5. update the weights
