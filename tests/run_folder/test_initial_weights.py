"""`init`: what is loaded from each kind of source, what is refused, and what belongs to the run's identity."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run, check, interrupted, lines, refused, tensors
from safetensors.torch import load_file, save_file
from tasks import Formats, Masked, WithBuffers
from torch import Tensor, nn

from distrib import Config, OwnLoop, Trainer
from distrib.completion import overrides
from distrib.errors import ConfigError, RunDirError
from distrib.monitor.compare.comparison import diverge
from distrib.monitor.compare.runs import load_runs
from distrib.run_folder.verify import verify_run
from distrib.training.commands import explain_run

State = dict[str, Tensor]


class Tied(Masked):
    """The output uses the embedding. A buffer is counted in integers, a parameter is in double precision."""

    def model(self) -> nn.Module:
        model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 11), nn.LayerNorm(11).double(), _Single())
        model[1].weight = model[0].weight
        model.register_buffer("steps", torch.tensor(0))
        return model

    def loss(self, output: Tensor, batch: Any) -> Any:
        return super().loss(output.float(), batch)


class _Single(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


class WithDouble(Tied):
    def forward(self, model: nn.Module, batch: Any) -> Any:
        x = batch[0]
        for part in model:  # type: ignore[attr-defined]
            x = part(x.double() if isinstance(part, nn.LayerNorm) else x)
        return x


def config(source: object, steps: int = 1, lr: float = 0.0, **more: Any) -> Config:
    """Return the config of a run that leaves its weights as they are, unless `lr` is given."""
    init = {"from": str(source), **more.pop("init", {})}
    return Config.from_dict(
        {
            "name": "run",
            "seed": 3,
            "data": {"global_batch_size": 8, "micro_batch_size": 4},
            "optim": {"name": "sgd", "lr": lr},
            "train": {"steps": steps, **more.pop("train", {})},
            "checkpoint": {"every_steps": 2},
            "init": init,
            **more,
        }
    )


def other(task: Masked, seed: int = 11) -> State:
    """Return weights that the task's model could have. All differ from those that it begins with."""
    torch.manual_seed(seed)
    return {
        name: torch.randn(value.shape).to(value.dtype) if value.is_floating_point() else value + 5
        for name, value in task.model().state_dict().items()
    }


def weights(run: Path) -> dict[str, Any]:
    return {name.removeprefix("model."): value for name, value in tensors(run).items() if name.startswith("model.")}


def check_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], np.asarray(value), err_msg=name)


def one_file(folder: Path, state: State) -> Path:
    save_file(state, folder / "weights.safetensors")
    return folder / "weights.safetensors"


def whole_folder(folder: Path, state: State) -> Path:
    save_file(state, folder / "model.safetensors")
    return folder


def shards(folder: Path, state: State) -> Path:
    """Write Hugging Face's layout."""
    halves = [list(state)[::2], list(state)[1::2]]
    files = {name: f"model-{half:05d}-of-00002.safetensors" for half, names in enumerate(halves, 1) for name in names}
    for file in set(files.values()):
        save_file({name: state[name] for name in state if files[name] == file}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def of_torch(suffix: str) -> Callable[[Path, State], Path]:
    def save(folder: Path, state: State) -> Path:
        torch.save(state, folder / f"weights{suffix}")
        return folder / f"weights{suffix}"

    return save


def run_folder(folder: Path, state: State) -> Path:
    """Train a run that begins with the weights and leaves them. That this is right is tested with other sources."""
    Trainer(Masked(), config(one_file(folder, state)), folder / "source").fit()
    return folder / "source"


def of_a_step(folder: Path, state: State) -> Path:
    return run_folder(folder, state) / "checkpoints" / "step-00000001"


SOURCES = [one_file, whole_folder, shards, of_torch(".pt"), of_torch(".bin"), run_folder, of_a_step]


@pytest.mark.parametrize("write", SOURCES, ids=["file", "folder", "shards", "pt", "bin", "run", "checkpoint"])
def test_what_is_loaded(tmp_path: Path, write: Callable[[Path, State], Path]) -> None:
    expected = other(Masked())
    source = write(tmp_path, expected)
    Trainer(Masked(), config(source, train={"ema": {}}), tmp_path / "run").fit()
    check_equal(weights(tmp_path / "run"), expected)
    average = {name: value for name, value in tensors(tmp_path / "run").items() if name.startswith("ema.")}
    check_equal({name.removeprefix("ema."): value for name, value in average.items()}, expected)
    recorded = json.loads((tmp_path / "run" / "environment.json").read_text())["init"]
    assert (recorded["missing"], recorded["unexpected"], recorded["left_out"]) == ([], [], [])
    assert sorted(recorded["loaded"]) == sorted(expected)
    (line,) = [event for event in lines(tmp_path / "run", "events.jsonl") if event["event"] == "initialized"]
    assert line["lines"][0].startswith(f"initial weights from {source}")
    assert "7 (0.weight, 1.0.weight, 1.0.bias, 2.0.weight, …), 1,147 elements" in line["lines"][1]


def test_some_names_and_a_rename(tmp_path: Path) -> None:
    """As load_state_dict(strict=False) does with a state_dict that is renamed and filtered."""
    state = other(Masked())
    given = {f"encoder.{name}": value for name, value in state.items()} | {"head.weight": torch.zeros(3)}
    given["encoder.2.1.weight"] = torch.zeros(4, 4)  # another head
    init = {"rename": {"encoder.": "", "encoder.1.": "1."}, "exclude": "2.1.*", "strict": False}
    Trainer(Masked(), config(one_file(tmp_path, given), init=init), tmp_path / "run").fit()
    torch.manual_seed(3)
    model = Masked().model()
    model.load_state_dict({name: value for name, value in state.items() if not name.startswith("2.1.")}, strict=False)
    check_equal(weights(tmp_path / "run"), model.state_dict())
    (line,) = [event for event in lines(tmp_path / "run", "events.jsonl") if event["event"] == "initialized"]
    assert [text.split(":")[0].strip() for text in line["lines"][1:]] == ["loaded", "missing", "unexpected", "left out"]
    assert "none" in line["lines"][2]
    assert "1 (head.weight), which are not read" in line["lines"][3]
    assert "2 (2.1.weight, 2.1.bias), by init.include and init.exclude" in line["lines"][4]


def test_nested_dictionaries_of_torch_save(tmp_path: Path) -> None:
    state = other(Masked())
    optimizer = torch.optim.AdamW(Masked().model().parameters()).state_dict()
    torch.save(
        {"model": state, "optimizer": optimizer, "moments": {"m": torch.ones(2)}, "step": 7}, tmp_path / "all.pt"
    )
    init = {"rename": {"model.": ""}, "exclude": ["moments.*"]}
    Trainer(Masked(), config(tmp_path / "all.pt", init=init), tmp_path / "run").fit()
    check_equal(weights(tmp_path / "run"), state)


@pytest.mark.parametrize("names", [("0.weight", "1.weight"), ("0.weight",), ("1.weight",)])
def test_tied_weights_and_other_dtypes(tmp_path: Path, names: tuple[str, ...]) -> None:
    state = other(WithDouble())
    state["0.weight"] = state["1.weight"]
    expected = {name: value for name, value in state.items() if name != "1.weight"}
    expected["0.weight"] = state["0.weight"].bfloat16().float()
    expected["2.bias"] = state["2.bias"].float().double()
    given = {name: value.clone() for name, value in state.items() if name not in ("0.weight", "1.weight")}
    given |= {name: state["0.weight"].bfloat16() for name in names}
    given |= {"2.bias": state["2.bias"].float(), "steps": state["steps"].int()}
    torch.save(given, tmp_path / "given.pt")
    Trainer(WithDouble(), config(tmp_path / "given.pt"), tmp_path / "run").fit()
    check_equal(weights(tmp_path / "run"), expected)
    Trainer(WithDouble(), config(tmp_path / "run"), tmp_path / "next").fit()  # its manifest knows the tied names
    check_equal(weights(tmp_path / "next"), expected)


def test_buffers_and_memory_formats(tmp_path: Path) -> None:
    """An evaluation before the first step uses running statistics."""
    for task in (WithBuffers(), Formats()):
        state = other(task)
        state |= {name: value.abs() for name, value in state.items() if name.endswith("running_var")}
        folder = tmp_path / type(task).__name__
        folder.mkdir()
        Trainer(task, config(one_file(folder, state), eval={"at_start": True}), folder / "run").fit()
        torch.manual_seed(3)
        model = task.model()
        model.load_state_dict(state)
        model.eval()
        data = task.eval_dataset()
        with torch.no_grad():
            loss = task.loss(model(data.tensors[0]), data.tensors)
        found = lines(folder / "run", "evals.jsonl")[0]["metrics"]["eval/loss"]
        assert found == pytest.approx(float(loss.total / loss.count), rel=1e-5)


def broken_index(folder: Path, **entries: str) -> Path:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": entries}))
    return folder


def another_index(folder: Path) -> Path:
    return broken_index(shards(folder, other(Masked())), a="model-00001-of-00002.safetensors")


def finished(folder: Path) -> Path:
    return run_folder(folder, other(Masked()))


def damaged_run(folder: Path) -> Path:
    (file,) = (of_a_step(folder, other(Masked()))).glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    return folder / "source"


def run_without_checkpoint(folder: Path) -> Path:
    (folder / "begun").mkdir()
    (folder / "begun" / "config.yaml").write_text("train: {steps: 1}\n")
    return folder / "begun"


def tied_that_differ(folder: Path) -> Path:
    return one_file(folder, other(WithDouble()))


def renamed(folder: Path) -> Path:
    return one_file(folder, {name.replace("2.0.", "2.norm."): value for name, value in other(Masked()).items()})


def wider(folder: Path) -> Path:
    return one_file(folder, {**other(Masked()), "2.1.weight": torch.zeros(12, 32), "2.1.bias": torch.zeros(12)})


def integers(folder: Path) -> Path:
    return one_file(folder, {**other(Masked()), "2.1.bias": torch.zeros(11, dtype=torch.int64)})


def pickled(folder: Path) -> Path:
    torch.save(Masked().model(), folder / "model.pt")
    return folder / "model.pt"


def plain(folder: Path) -> Path:
    return one_file(folder, other(Masked()))


def beside(*names: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        for name in names:
            (folder / name).write_text("")
        return folder

    return make


REFUSALS: list[tuple[Callable[[Path], object], dict[str, Any], str]] = [
    (lambda folder: folder / "nowhere", {}, "nowhere: no such file or folder, and nothing is downloaded"),
    (lambda folder: "a\nb\0", {}, r"init.from: a\nb\x00: no such file"),
    (lambda folder: "~nobody-of-this-name/x", {}, "init.from: "),
    (lambda folder: "x" * 5000, {}, "cannot be read: File name too long"),
    (beside("w.txt"), {}, "is no run folder and has no model.safetensors or model.safetensors.index.json"),
    (beside("a.pt", "b.safetensors"), {}, "; give one of its files: a.pt, b.safetensors"),
    (lambda folder: beside("w.npz")(folder) / "w.npz", {}, "or a file that ends with .safetensors, .pt, .pth, .bin"),
    (lambda folder: beside("w.safetensors")(folder) / "w.safetensors", {}, "cannot be read: Error while deserializing"),
    (lambda folder: broken_index(folder, a="b.safetensors"), {}, "b.safetensors: cannot be read: No such file"),
    (lambda folder: broken_index(folder, a="../b.safetensors"), {}, "has no weight_map from names to files in this"),
    (
        another_index,
        {},
        "names a in model-00001",
    ),
    (pickled, {}, "holds Python objects besides tensors, and unpickling them can run code"),
    (run_without_checkpoint, {}, "is a run folder that has no checkpoint yet"),
    (damaged_run, {}, "damaged: its content is not what the manifest says; choose another with init.checkpoint"),
    (finished, {"checkpoint": 7}, "has no checkpoint of step 7; it has: 1"),
    (
        finished,
        {"checkpoint": "best"},
        "init.checkpoint best: no evaluation of",
    ),
    (plain, {"checkpoint": 7}, "init.checkpoint: 7 is for a run folder, and"),
    (plain, {"include": ["1.*", "3.*"]}, "init.include: 3.* matches no name of the model or of"),
    (plain, {"exclude": "2.1.wieght"}, "init.exclude: 2.1.wieght matches no name"),
    (plain, {"exclude": "2.1.wieght"}, ", did you mean 2.1.weight?"),
    (plain, {"rename": {"encoder.": ""}}, "begins with 'encoder.'; the source has 7 (0.weight"),
    (plain, {"rename": {"1.0.": "2.1."}}, "both become 2.1."),
    (plain, {"exclude": "*"}, "has none of the model's tensors, such as 0.weight"),
    (renamed, {}, "lacks 2 of the model's tensors, first 2.0.weight, did you mean 2.norm.weight?, and has 2 that"),
    (wider, {"strict": False}, "2.1.weight has the shape [12, 32] in"),
    (wider, {"strict": False}, "and [11, 32] in the model; leave it out: init.exclude: [2.1.weight] (and 1 more)"),
    (integers, {}, "2.1.bias is int64 in"),
    (tied_that_differ, {}, "0.weight and 1.weight are one tensor in the model, and differ in"),
]


@pytest.mark.parametrize(("source", "init", "said"), REFUSALS, ids=range(len(REFUSALS)))
def test_refused_before_anything_is_written(
    tmp_path: Path, source: Callable[[Path], object], init: dict[str, Any], said: str
) -> None:
    task = WithDouble() if source is tied_that_differ else Masked()
    given = config(source(tmp_path), init=init)
    with pytest.raises(ConfigError) as error:
        Trainer(task, given, tmp_path / "run").fit()
    assert said in str(error.value)
    assert str(error.value).startswith("init.")
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2
    assert not (tmp_path / "run").exists()


def test_a_source_that_changes_after_the_checks(tmp_path: Path) -> None:
    trainer = Trainer(Masked(), config(plain(tmp_path)), tmp_path / "run")
    one_file(tmp_path, {**other(Masked()), "more": torch.zeros(2)})
    with pytest.raises(ConfigError, match=r"weights\.safetensors: .* sees another file than rank 0"):
        trainer.fit()
    trainer = Trainer(Masked(), config(plain(tmp_path)), tmp_path / "run")
    (tmp_path / "weights.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"weights\.safetensors: .* cannot read it: No such file or directory"):
        trainer.fit()
    assert not (tmp_path / "run").exists()


def test_keys_that_are_wrong() -> None:
    for init, said in (
        ({"from": "x", "form": "y"}, "init.form: unknown key, did you mean init.from?"),
        ({}, "init.from: missing, and has no default"),
        ("runs/a", "did you mean init.from=runs/a?"),
        ({"from": "x", "checkpoint": "last"}, "init.checkpoint: 'last' is not newest, best or a step"),
        ({"from": "x", "rename": ["a"]}, "init.rename: ['a']: input should be a valid dictionary"),
    ):
        with pytest.raises(ConfigError) as error:
            Config.from_dict({"train": {"steps": 1}, "init": init})
        assert said in str(error.value)
    assert overrides([], "init.f") == ["init.from="]
    with pytest.raises(ConfigError, match=r"init: is not for a loop of one's own, which does that itself"):
        OwnLoop(config("x"), Masked().train_dataset(), {"model": Masked().model()})


@pytest.fixture
def begun(tmp_path: Path) -> tuple[Path, Path]:
    """Return a run that was killed after its checkpoint of step 2, and its source."""
    source = one_file(tmp_path, other(Masked()))
    Trainer(Masked(), config(source, steps=4, lr=0.1), tmp_path / "undisturbed").fit()
    return interrupted(tmp_path / "undisturbed", tmp_path / "run", 2), source


def test_a_run_resumes_without_its_source(begun: tuple[Path, Path], tmp_path: Path) -> None:
    run, source = begun
    recorded = json.loads((run / "environment.json").read_text())["init"]
    source.unlink()
    Trainer(Masked(), config(source, steps=4, lr=0.1), run).fit()
    check_equal(weights(run), weights(tmp_path / "undisturbed"))
    assert json.loads((run / "environment.json").read_text())["init"] == recorded
    assert verify_run(run).steps == 4
    assert Trainer(Masked(), config(source, steps=4, lr=0.1), run).fit()["steps"] == 4  # had finished


def test_a_source_may_move(begun: tuple[Path, Path], tmp_path: Path) -> None:
    run, source = begun
    moved = source.rename(tmp_path / "elsewhere.safetensors")
    Trainer(Masked(), config(moved, steps=4, lr=0.1), run).fit()
    assert json.loads((run / "environment.json").read_text())["init"]["path"] == str(moved)
    assert verify_run(run).steps == 4
    with pytest.raises(ConfigError, match=r"elsewhere\.pt: no such file"):
        Trainer(Masked(), config(tmp_path / "elsewhere.pt", steps=4, lr=0.1), run)


def test_another_source_is_another_run(begun: tuple[Path, Path], tmp_path: Path) -> None:
    run, source = begun
    one_file(tmp_path, other(Masked(), seed=12))
    said = r"holds a run of another source of its initial weights \(init.from was .* with the sha256 \w{12}…, is "
    with pytest.raises(RunDirError, match=said):
        Trainer(Masked(), config(source, steps=4, lr=0.1), run).fit()
    for init, key in (
        ({"exclude": "2.1.*"}, r"init.exclude was \[\], is \['2.1.\*'\]"),
        ({"rename": {"0.": "0."}}, r"init.rename.0. was None, is '0.'"),
    ):
        with pytest.raises(RunDirError, match=f"holds a run of another config .*{key}"):
            Trainer(Masked(), config(source, steps=4, lr=0.1, init=init), run).fit()
    without = {key: value for key, value in config(source, steps=4, lr=0.1).model_dump().items() if key != "init"}
    with pytest.raises(RunDirError, match=r"holds a run of another config .*init\.include"):
        Trainer(Masked(), Config.from_dict(without), run).fit()


def test_a_run_without_a_checkpoint_begins_again(begun: tuple[Path, Path], tmp_path: Path) -> None:
    run, source = begun
    shutil.rmtree(run / "checkpoints")
    moved = source.rename(tmp_path / "moved.safetensors")
    with pytest.raises(ConfigError, match=r"weights\.safetensors: no such file"):
        Trainer(Masked(), config(source, steps=4, lr=0.1), run)
    Trainer(Masked(), config(moved, steps=4, lr=0.1), run).fit()
    assert [line["loss"] for line in lines(run)] == [line["loss"] for line in lines(tmp_path / "undisturbed")]


def test_a_run_that_trains_on_stays_the_same_source(tmp_path: Path) -> None:
    run = run_folder(tmp_path, other(Masked()))
    Trainer(Masked(), config(run, steps=4, lr=0.1), tmp_path / "finished").fit()
    resumed = interrupted(tmp_path / "finished", tmp_path / "run", 2)
    shutil.copytree(run / "checkpoints" / "step-00000001", run / "checkpoints" / "step-00000003")
    Trainer(Masked(), config(run, steps=4, lr=0.1), resumed).fit()
    shutil.rmtree(run / "checkpoints" / "step-00000001")  # pruned
    resumed = interrupted(tmp_path / "finished", tmp_path / "later", 2)
    Trainer(Masked(), config(run, steps=4, lr=0.1), resumed).fit()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    another = of_a_step(elsewhere, other(Masked(), 12))
    with pytest.raises(RunDirError, match="another source of its initial weights"):
        Trainer(Masked(), config(another, steps=4, lr=0.1), resumed).fit()


def test_a_fork_begins_with_its_checkpoint(begun: tuple[Path, Path], tmp_path: Path) -> None:
    run, source = begun
    source.unlink()
    fork = Trainer(
        Masked(), config(source, steps=4, lr=0.1), tmp_path / "fork", resume=str(run), fork=True, verbosity="quiet"
    )
    fork.fit()
    check_equal(weights(tmp_path / "fork"), weights(tmp_path / "undisturbed"))
    (warning,) = [event["reason"] for event in lines(tmp_path / "fork", "events.jsonl") if event["event"] == "warning"]
    assert warning == "init: not used, because a fork begins with the weights of its checkpoint"
    again = interrupted(tmp_path / "fork", tmp_path / "again", 4)
    Trainer(Masked(), config(source, steps=4, lr=0.1), again).fit()


def test_compare_names_the_source(tmp_path: Path) -> None:
    for name, seed in (("one", 11), ("two", 12)):
        (tmp_path / f"of-{name}").mkdir()
        source = one_file(tmp_path / f"of-{name}", other(Masked(), seed))
        Trainer(Masked(), config(source, steps=2), tmp_path / name).fit()
    parted = diverge(*load_runs([tmp_path / "one", tmp_path / "two"]))
    assert parted.cause == "config"
    assert "init.sha256" in parted.because


def test_damage_of_the_record_is_found(begun: tuple[Path, Path]) -> None:
    run, _ = begun
    environment = json.loads((run / "environment.json").read_text())
    environment["init"]["sha256"] = "0" * 64
    (run / "environment.json").write_text(json.dumps(environment))
    with pytest.raises(Exception, match=f"damaged: init is {'0' * 64}, was "):
        verify_run(run)


@pytest.mark.parametrize("text", [None, "{"])
def test_the_record_is_taken_from_a_checkpoint(begun: tuple[Path, Path], text: str | None) -> None:
    run, source = begun
    recorded = json.loads((run / "environment.json").read_text())["init"]
    (run / "environment.json").unlink() if text is None else (run / "environment.json").write_text(text)
    source.unlink()
    Trainer(Masked(), config(source, steps=4, lr=0.1), run).fit()
    assert json.loads((run / "environment.json").read_text())["init"] == recorded
    assert verify_run(run).steps == 4


def test_the_commands(run: Run, tmp_path: Path) -> None:
    """`explain` prints what will be loaded, and refuses what `train` refuses."""
    source = one_file(tmp_path, {name: value for name, value in other(Masked()).items() if name != "2.1.bias"})
    values = {**config(source).model_dump(mode="json", exclude={"tracking"}), "task": {"target": "tasks:Masked"}}
    (tmp_path / "config.yaml").write_text(json.dumps(values))
    for command in (("explain",), ("train",), ("launch", "--processes", 2)):
        said = refused(run("distrib", *command, "config.yaml"))
        assert said.startswith(f"error: init.from: {source} lacks 1 of the model's tensors, first 2.1.bias; set")
    assert not (tmp_path / "runs").exists()
    said = check(run("distrib", "train", "config.yaml", "init.strict=false"))
    for line in (
        f"initial weights from {source}",
        "  loaded:      6 (0.weight, 1.0.weight, 1.0.bias, 2.0.weight, …), 1,136 elements",
        "  missing:     1 (2.1.bias), which keep the values from Task.model",
        "  unexpected:  none",
    ):
        assert f"{line}\n" in said


def test_explain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = one_file(tmp_path, other(Masked()))
    explain_run(config(source, task={"target": "tasks:Masked"}, strategy={"name": "zero3"}), processes=2)
    assert f"initial weights from {source}\n  loaded:      7 (0.weight" in capsys.readouterr().out
    assert load_file(source).keys() == other(Masked()).keys()
