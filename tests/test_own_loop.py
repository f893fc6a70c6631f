"""docs/own-loop.md and examples/gan.py: loops of one's own equal plain PyTorch loops, and go on after a kill."""

import ast
import json
import random
import runpy
import shutil
import signal
import sys
import traceback
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    BLOCK,
    ROOT,
    Run,
    check,
    events,
    lines,
    losses,
    refused,
    run_page,
    start,
    steps_done,
    tensors,
    until,
)
from safetensors.numpy import load_file
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from distrib.data.order import derive_seed, sample_indices
from distrib.run_folder.verify import verify_run

pytestmark = pytest.mark.slow
TOLERANCE = 1e-5  # see test_parity
PAGE = ROOT / "docs" / "own-loop.md"
STEPS, MICRO, BATCH, NOISE, RATE = 150, 16, 64, 16, 0.002


def write_pages_files(folder: Path) -> None:
    for _, title, text in BLOCK.findall(PAGE.read_text()):
        if title:
            (folder / title).write_text(text)


@cache
def plain_losses() -> list[float]:
    """Train the page's model in one process on whole batches. Only the order of the data is distrib's."""
    torch.manual_seed(0)
    inputs = torch.randn(500, 8)
    targets = (inputs.sum(1) > 0).long()
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.1), []
    for step in range(30):
        batch = sample_indices(np.arange(step * 50, (step + 1) * 50, dtype=np.uint64), 500, 0).astype(np.int64)
        loss = F.cross_entropy(model(inputs[batch]), targets[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize(("processes", "strategy"), [(1, "auto"), (2, "auto"), (2, "zero3"), (5, "auto")])
def test_the_pages_loop(run: Run, tmp_path: Path, processes: int, strategy: str) -> None:
    if (processes, strategy) == (2, "auto"):  # these are the page's commands
        assert len(run_page(PAGE, run, tmp_path)) == 2
    else:
        write_pages_files(tmp_path)
        with (tmp_path / "own.yaml").open("a") as file:
            file.write(f"strategy: {{name: {strategy}}}\n")
        check(run("distrib", "launch", "--processes", processes, "own.py"))
    folder = tmp_path / "runs" / "own"
    np.testing.assert_allclose(losses(folder), plain_losses(), rtol=TOLERANCE)
    assert verify_run(folder).samples == 30 * 50
    said = check(run("distrib", "launch", "--processes", processes, "own.py"))
    assert "runs/own had finished before: " in said
    assert events(folder).count("started") == 1


@cache
def plain_gan() -> tuple[list[float], list[float]]:
    """Train both models in one process; return the losses of generator and critic. The order of the data and the seeds
    of the noise are distrib's."""
    pictures = torch.tensor(load_digits().data / 16, dtype=torch.float32)
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(NOISE, 64), nn.ReLU(), nn.Linear(64, 64), nn.Sigmoid())
    critic = nn.Sequential(nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))
    optimizers = [torch.optim.Adam(model.parameters(), lr=RATE, betas=(0.5, 0.999)) for model in (generator, critic)]
    found: tuple[list[float], list[float]] = [], []
    for step in range(STEPS):
        order = sample_indices(np.arange(step * BATCH, (step + 1) * BATCH, dtype=np.uint64), len(pictures), 0)
        real, noise = pictures[order.astype(np.int64)], []
        for micro_batch in range(BATCH // MICRO):
            torch.manual_seed(derive_seed(0, step, micro_batch))
            noise.append(torch.randn(MICRO, NOISE))
        fake = generator(torch.cat(noise))
        scores = critic(torch.cat([real, fake.detach()]))
        wanted = torch.cat([torch.ones(BATCH, 1), torch.zeros(BATCH, 1)])
        critic_loss = F.binary_cross_entropy_with_logits(scores, wanted)
        generator_loss = F.binary_cross_entropy_with_logits(critic(fake), torch.ones(BATCH, 1))
        of_generator = torch.autograd.grad(generator_loss, list(generator.parameters()))
        of_critic = torch.autograd.grad(critic_loss, list(critic.parameters()))
        for model, gradients in ((generator, of_generator), (critic, of_critic)):
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient
        for optimizer in optimizers:
            optimizer.step()
        found[0].append(generator_loss.item())
        found[1].append(critic_loss.item())
    return found


def copy_gan(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for name in ("gan.py", "gan.yaml"):
        shutil.copy(ROOT / "examples" / name, folder)
    config = (folder / "gan.yaml").read_text()
    (folder / "gan.yaml").write_text(config.replace("{steps: 300,", f"{{steps: {STEPS},").replace("50}", "20}"))
    return folder / "runs" / "gan"


def check_gan(folder: Path) -> None:
    """Measured: at most 2.5e-7 apart in all steps, on 1, 2 and 4 processes, bitwise and fast."""
    for found, expected in zip(
        (losses(folder), [line["train/critic_loss"] for line in lines(folder)]), plain_gan(), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=TOLERANCE)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from conftest import no_process_left, starter

    folder = tmp_path_factory.mktemp("gan")
    run = copy_gan(folder)
    with no_process_left() as mark:
        check(starter(mark, folder)("distrib", "launch", "--processes", 2, "gan.py"))
    return run


def check_same_bits(run: Path, other: Path) -> None:
    for key in ("step", "loss", "train/critic_loss", "grad_norm", "samples", "verdict"):
        assert [line[key] for line in lines(run)] == [line[key] for line in lines(other)], key
    found, expected = tensors(run), tensors(other)
    assert found.keys() == expected.keys()
    assert {name.split("/")[0] for name in found} == {"generator", "critic"}
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_a_gan_equals_a_plain_loop(undisturbed: Path) -> None:
    check_gan(undisturbed)


def test_export_writes_a_file_for_each_model(run: Run, tmp_path: Path, undisturbed: Path) -> None:
    said = check(run("distrib", "export", undisturbed, "--out", tmp_path / "out"))
    assert said.split() == [str(tmp_path / "out" / f"{name}.safetensors") for name in ("critic", "generator")]
    for name in ("critic", "generator"):
        prefix = f"{name}/model."
        expected = {key.removeprefix(prefix): v for key, v in tensors(undisturbed).items() if key.startswith(prefix)}
        found = load_file(tmp_path / "out" / f"{name}.safetensors")
        assert found.keys() == expected.keys() > {"0.weight"}
        for key, value in expected.items():
            np.testing.assert_array_equal(found[key], value)
    assert "generator.safetensors: exists already" in refused(run("distrib", "export", undisturbed, "--out", "out"))


@pytest.mark.parametrize("processes", [1, 4])
def test_bitwise_on_other_numbers_of_processes(run: Run, tmp_path: Path, undisturbed: Path, processes: int) -> None:
    folder = copy_gan(tmp_path)
    check(run("distrib", "launch", "--processes", processes, "gan.py"))
    check_same_bits(folder, undisturbed)


def test_ddp_equals_a_plain_loop(run: Run, tmp_path: Path) -> None:
    """On four processes, where the order of a sum is not that of the plain loop."""
    folder = copy_gan(tmp_path)
    check(run("distrib", "launch", "--processes", 4, "gan.py", "train.determinism=fast"))
    check_gan(folder)


def test_killed_at_random_moments_and_asked_to_stop(mark: str, tmp_path: Path, undisturbed: Path) -> None:
    """The two models of a checkpoint are always of the same step."""
    folder, chance = copy_gan(tmp_path), random.Random(11)
    for number in (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM):
        process = start(mark, tmp_path, "launch", "--processes", 2, "gan.py")
        wanted = steps_done(folder) + chance.randint(10, 40)
        until(lambda wanted=wanted: steps_done(folder) >= wanted, "it does not go on")  # type: ignore[misc]
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == (75 if number == signal.SIGTERM else -9), said
    assert "preempted" in events(folder)
    process = start(mark, tmp_path, "launch", "--processes", 2, "gan.py")
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert events(folder).count("resumed") >= 2
    check_same_bits(folder, undisturbed)
    verify_run(folder)
    assert json.loads((folder / "summary.json").read_text())["restarts"] == 3


class WithoutDevice(TorchFunctionMode):
    """Notes the calls in a script's loop that make a tensor and name no device: on a GPU it would be on the CPU."""

    makers = (torch.arange, torch.empty, torch.full, torch.ones, torch.rand, torch.randint, torch.randn, torch.zeros)

    def __init__(self, script: Path) -> None:
        super().__init__()
        (loop,) = [
            node
            for node in ast.walk(ast.parse(script.read_text()))
            if isinstance(node, ast.For) and ast.unparse(node.iter) == "loop"
        ]
        self.file, self.lines = str(script), range(loop.lineno + 1, (loop.end_lineno or 0) + 1)
        self.found: list[str] = []
        self.seen = 0  # operations in the loop

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = [frame for frame, _ in traceback.walk_stack(None) if frame.f_code.co_filename == self.file]
        if any(frame.f_lineno in self.lines for frame in own):
            self.seen += 1
            if func in (*self.makers, torch.tensor) and "device" not in (kwargs or {}):
                caller = sys._getframe(1)
                if caller.f_code.co_filename == self.file:
                    self.found.append(f"line {caller.f_lineno}: torch.{func.__name__}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["own.py", "gan.py"])
def test_a_loop_makes_its_tensors_on_the_engines_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Here that is the CPU, so a loop with tensors elsewhere would run too."""
    write_pages_files(tmp_path)
    copy_gan(tmp_path)
    config = (tmp_path / "own.yaml").read_text()
    (tmp_path / "own.yaml").write_text(config.replace("epochs: 3", "steps: 2"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *(["train.steps=2"] if name == "gan.py" else [])])
    mode = WithoutDevice(tmp_path / name)
    with mode:
        runpy.run_path(str(tmp_path / name), run_name="__main__")
    assert mode.seen > 100
    assert mode.found == []
    assert ".to_device(" in (tmp_path / name).read_text()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["strategy.name=zero2", "train.determinism=fast"],
            "strategy.name: zero2 cuts models, and the loop has 2 that use",
        ),
        (
            ["train.stop={metric: eval/loss}"],
            "train.stop: is not for a loop of one's own, which does that itself; leave",
        ),
        (["eval.every_steps=3"], "eval.every_steps: is not for a loop of one's own, which does that itself; leave it"),
        (["optim.groups=[{match: '*', lr: 1}]"], "optim.groups: is not for a loop of one's own, which does that"),
        (
            ["optim.schedule=cosine"],
            "optim.schedule: is not for a loop of one's own; give engine.step the rate of each",
        ),
    ],
)
def test_keys_that_are_not_for_it(run: Run, tmp_path: Path, overrides: list[str], said: str) -> None:
    folder = copy_gan(tmp_path)
    assert said in refused(run("distrib", "launch", "--processes", 2, "gan.py", *overrides))
    assert not folder.exists()


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ('{"model": model}', '{"a model": model}', "OwnLoop: 'a model' cannot be the name of a model; give letters"),
        ('{"model": model}', "{}", 'OwnLoop: give its models by name, {"model": module}'),
        (
            '{"model": model})',
            '{"model": model}, optimizers={"other": 3})',
            "an optimizer for other, of which there is",
        ),
        (
            "        loop.record(engine.step(lr=0.1))",
            "        engine.step(lr=0.1)",
            "step 1 is not recorded; call loop.re",
        ),
        (
            "engine.step(lr=0.1))",
            "engine.step(lr=0.1), other=3)",
            "record needs the step of model; it got a step, other",
        ),
    ],
)
def test_mistakes_in_the_loop(run: Run, tmp_path: Path, before: str, after: str, said: str) -> None:
    write_pages_files(tmp_path)
    text = (tmp_path / "own.py").read_text()
    assert before in text
    (tmp_path / "own.py").write_text(text.replace(before, after))
    assert said in refused(run("distrib", "launch", "--processes", 1, "own.py"))


def test_another_model_in_the_same_folder(run: Run, tmp_path: Path) -> None:
    write_pages_files(tmp_path)
    check(run("distrib", "launch", "--processes", 1, "own.py"))
    text = (tmp_path / "own.py").read_text()
    (tmp_path / "own.py").write_text(text.replace('"model"', '"network"'))
    line = refused(run("distrib", "launch", "--processes", 1, "own.py"))
    assert "runs/own: holds a run of another task (the shape of parameter model.0.weight was [32, 8]" in line
