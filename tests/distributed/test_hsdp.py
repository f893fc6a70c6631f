"""hsdp on four processes: two groups of two, each with a copy of the model."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cases import EVERY, OPTIMIZERS, PRECISIONS, SHARDED_WINDOWS, moved
from conftest import Run, check, check_same, lines, losses, refused, results, tensors
from test_parity import check_parity

pytestmark = [pytest.mark.timeout(900), pytest.mark.xdist_group("worlds")]

ROUNDING = 1e-5  # see test_parity
COMPRESSION = 1e-3  # see test_strategies


@pytest.fixture(scope="module")
def four(world: Callable[[int], Path]) -> Path:
    return world(4)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_its_curve_is_the_plain_loops(four: Path, optimizer: str) -> None:
    for window in SHARDED_WINDOWS[optimizer]:
        check_parity(four / f"hsdp-{optimizer}-{window}", optimizer, 4 * window * 4)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_is_ddps(four: Path, precision: str) -> None:
    run, expected = four / f"hsdp-{precision}", four / f"ddp-{precision}"
    np.testing.assert_allclose(losses(run), losses(expected), rtol=ROUNDING)
    np.testing.assert_allclose(norms(run), norms(expected), rtol=ROUNDING)  # copies are not counted twice
    assert [line.get("loss_scale") for line in lines(run)] == [line.get("loss_scale") for line in lines(expected)]


def norms(run: Path) -> list[float]:
    return [line["grad_norm"] for line in lines(run)]


@pytest.mark.parametrize("option", ["offload", "kept", "by-1", "by-4"])
def test_options_change_nothing(four: Path, option: str) -> None:
    np.testing.assert_allclose(losses(four / f"hsdp-{option}"), losses(four / "ddp-no"), rtol=ROUNDING)


def test_gradients_in_bf16(four: Path) -> None:
    got, full = losses(four / "hsdp-compressed"), losses(four / "ddp-no")
    assert got != losses(four / "hsdp-no")
    np.testing.assert_allclose(got, full, rtol=COMPRESSION)


def test_all_groups_skip_the_same_step(four: Path) -> None:
    verdicts = [[line["verdict"] for line in lines(four / f"{name}-nan")] for name in ("hsdp", "ddp")]
    assert verdicts[0] == verdicts[1]
    assert len(set(verdicts[0])) == 2
    found, expected = (np.array(losses(four / f"{name}-nan"), dtype=float) for name in ("hsdp", "ddp"))
    np.testing.assert_allclose(found, expected, rtol=ROUNDING)  # a loss that is not finite is None, here NaN


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_gone_on_with_it_is_the_same_bits(four: Path, precision: str) -> None:
    check_same(four / f"hsdp-{precision}-resumed", four / f"hsdp-{precision}")


@pytest.mark.parametrize(("before", "after"), moved(4))
def test_it_goes_on_from_every_strategy_and_to_every_strategy(four: Path, before: str, after: str) -> None:
    run, expected = four / f"{before}-to-{after}", four / "ddp-no"
    strategies = [line["strategy"] for line in lines(run)]
    assert set(strategies[:EVERY]) == {before}
    assert set(strategies[EVERY:]) == {after}
    np.testing.assert_allclose(losses(run), losses(expected), rtol=ROUNDING)
    for name, value in tensors(expected).items():  # tolerance: see test_resume
        np.testing.assert_allclose(tensors(run)[name], value, rtol=1e-3, atol=1e-5, err_msg=name)


def test_a_checkpoint_holds_each_element_once(four: Path) -> None:
    """The two copies write it together: each rank a part."""
    (*_, newest) = sorted((four / "hsdp-no" / "checkpoints").iterdir())
    manifest = json.loads((newest / "manifest.json").read_text())
    written: Counter[str] = Counter()
    for entry in manifest["tensors"].values():
        for file, _, length in entry["stretches"]:
            written[file] += length
    assert sum(written.values()) == sum(np.prod(entry["shape"], dtype=int) for entry in manifest["tensors"].values())
    assert len(written) == 4


def test_memory_is_what_the_plan_says(four: Path) -> None:
    for rank in range(4):
        memory = results(four, rank)["memory"]
        found, fsdp2 = memory["hsdp"], memory["fsdp2"]
        assert found["parameters"] == pytest.approx(found["planned_parameters"], rel=0.05)
        planned = found["planned_parameters"] + found["planned_optimizer_state"] + found["planned_average"]
        assert found["average"] == pytest.approx(found["planned_average"], rel=0.05)
        assert found["all"] == pytest.approx(planned, rel=0.05)
        assert found["parameters"] == pytest.approx(2 * fsdp2["parameters"], rel=0.05)  # half as many ranks share it


def test_explain_shows_its_memory(run: Run, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("task: {target: tasks:Masked}\ntrain: {steps: 2}\n")
    shown = {}
    for strategy in ("{name: ddp}", "{name: hsdp, shard_size: 2}"):
        text = check(run("distrib", "explain", "c.yaml", "--processes", 4, f"strategy={strategy}"))
        (line,) = [line for line in text.splitlines() if "parameters, a rank" in line]
        shown[strategy] = int(line.split()[-2].replace(",", ""))
    whole, half = shown.values()
    assert 0.5 <= half / whole < 0.6


def test_it_is_evaluated_on_any_number_of_processes(four: Path, run: Run) -> None:
    found = [
        json.loads(check(run(*command, "evaluate", "--json", four / "hsdp-no")))["metrics"]
        for command in (("distrib",), ("torchrun", "--nproc-per-node", "3", "-m", "distrib"))
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        ("{name: hsdp}", "strategy.shard_size: missing, and has no default"),
        ("{name: hsdp, shard_size: 3}", "strategy.shard_size: 3 does not divide 4 processes; take 1, 2, 4"),
        ("{name: hsdp, shard_size: 0}", "strategy.shard_size: 0: input should be greater than 0"),
        ("{name: fsdp2, shard_size: 2}", "strategy.shard_size: 2 is for hsdp, and the strategy is fsdp2"),
    ],
)
def test_what_is_refused(run: Run, tmp_path: Path, strategy: str, said: str) -> None:
    (tmp_path / "c.yaml").write_text("task: {target: tasks:Masked}\ntrain: {steps: 2}\n")
    assert said in refused(run("distrib", "explain", "c.yaml", "--processes", 4, f"strategy={strategy}"))
