"""The schedules equal those of torch and transformers, step by step, and what does not fit into the run is refused."""

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.optim import SGD, Optimizer
from torch.optim import lr_scheduler as torchs

from distrib import Config, RunPlan
from distrib.errors import ConfigError
from distrib.schedule import SCHEDULES

Given = str | dict[str, Any] | list[dict[str, Any]]
LENGTHS = st.integers(2, 80)
RATIOS = st.sampled_from([0.0, 0.1, 0.25, 1.0]) | st.floats(0, 1)


def factors(schedule: Given, steps: int, warmup: int = 0, more: int = 0) -> list[float]:
    optim = {"schedule": schedule, "warmup_steps": warmup}
    factor = Config.from_dict({"optim": optim, "train": {"steps": steps}}).optim.curve(steps).factor
    return [factor(update) for update in range(steps + more)]


def stepped(make: Callable[[Optimizer], Any], steps: int) -> list[float]:
    """Return the rates of another library's schedule, as training steps it, for the base rate 1."""
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SequentialLR steps its parts in a way that torch itself warns of
        scheduler = make(optimizer)
        rates = [float(optimizer.param_groups[0]["lr"])]
        while len(rates) < steps:
            optimizer.step()
            scheduler.step()
            rates.append(float(optimizer.param_groups[0]["lr"]))
    return rates


def check_equal(found: list[float], expected: list[float]) -> None:
    """torch computes a rate from the one before, so a rounding of each update adds up."""
    assert found == pytest.approx(expected, rel=1e-11, abs=1e-12)


def after_warmup(warmup: int, make: Callable[[Optimizer], Any]) -> Callable[[Optimizer], Any]:
    """Return torch's LinearLR that rises as ours does, and then another schedule."""

    def both(optimizer: Optimizer) -> Any:
        if not warmup:
            return make(optimizer)
        rising = torchs.LinearLR(optimizer, 1 / (warmup + 1), total_iters=warmup)
        return torchs.SequentialLR(optimizer, [rising, make(optimizer)], [warmup])

    return both


# As it was before schedules had options. Runs from then resume to the same bits.
def learning_rate_factor(update: int, schedule: str, warmup_steps: int, num_steps: int) -> float:
    if update < warmup_steps:
        return (update + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    done = min(1.0, (update - warmup_steps) / max(1, num_steps - warmup_steps))
    if schedule == "linear":
        return 1.0 - done
    assert schedule == "cosine", schedule
    return 0.5 * (1.0 + math.cos(math.pi * done))


@given(st.sampled_from(["constant", "linear", "cosine"]), st.integers(0, 300), st.integers(1, 300))
def test_the_first_three_have_the_bits_that_they_always_had(name: str, warmup: int, steps: int) -> None:
    expected = [learning_rate_factor(update, name, warmup, steps) for update in range(steps + 5)]
    assert factors(name, steps, warmup, more=5) == expected


@given(st.sampled_from(["constant", "linear", "cosine"]), st.integers(0, 50), st.integers(1, 500))
def test_the_factor_stays_between_0_and_1_and_reaches_1(name: str, warmup: int, extra: int) -> None:
    steps = warmup + extra
    *found, past = factors(name, steps, warmup, more=1)
    assert found[:warmup] == sorted(found[:warmup])
    assert all(0 < factor <= 1 for factor in found)
    assert found[warmup] == 1.0
    falling = found[warmup:]
    assert falling == sorted(falling, reverse=True)
    if name == "constant":
        assert set(falling) == {1.0}
    else:
        assert past == pytest.approx(0, abs=1e-15)


def test_values_at_known_steps() -> None:
    assert factors("linear", 100)[50] == 0.5
    assert factors("cosine", 100)[50] == pytest.approx(0.5)
    assert factors("cosine", 100)[25] == pytest.approx(0.853553390593)
    assert factors("constant", 100, 9)[4] == 0.5
    assert factors({"name": "inverse_sqrt", "timescale": 10}, 100)[30] == 0.5
    assert factors({"name": "wsd", "decay_steps": 20}, 100, 9)[4::15] == [0.5, 1, 1, 1, 1, 1, pytest.approx(0.3)]


@given(LENGTHS, st.integers(0, 20), RATIOS)
def test_linear_equals_torchs(length: int, warmup: int, low: float) -> None:
    found = factors({"name": "linear", "min_lr_ratio": low}, warmup + length, warmup)
    make = after_warmup(warmup, lambda optimizer: torchs.LinearLR(optimizer, 1.0, low, length))
    check_equal(found, stepped(make, warmup + length))


@given(LENGTHS, st.integers(0, 20), RATIOS)
def test_cosine_equals_torchs(length: int, warmup: int, low: float) -> None:
    found = factors({"name": "cosine", "min_lr_ratio": low}, warmup + length, warmup)
    make = after_warmup(warmup, lambda optimizer: torchs.CosineAnnealingLR(optimizer, length, low))
    check_equal(found, stepped(make, warmup + length))


@given(LENGTHS, st.integers(0, 20), st.floats(0.1, 4))
def test_polynomial_equals_torchs(length: int, warmup: int, power: float) -> None:
    found = factors({"name": "polynomial", "power": power}, warmup + length, warmup)
    make = after_warmup(warmup, lambda optimizer: torchs.PolynomialLR(optimizer, length, power))
    check_equal(found, stepped(make, warmup + length))


@given(
    LENGTHS,
    st.floats(0, 1),
    st.sampled_from(["cos", "linear"]),
    st.floats(1, 100),
    st.floats(1, 1e5),
    st.booleans(),
)
def test_one_cycle_equals_torchs(
    steps: int, start: float, anneal: str, div: float, final: float, three_phase: bool
) -> None:
    start = start / 2 if three_phase else start
    ends = {start * steps - 1, *([2 * start * steps - 2] if three_phase else [])}
    assume(0.0 not in ends)  # torch divides by 0
    options = {"pct_start": start, "anneal_strategy": anneal, "div_factor": div, "final_div_factor": final}
    options["three_phase"] = three_phase
    make = lambda optimizer: torchs.OneCycleLR(optimizer, 1.0, steps, cycle_momentum=False, **options)  # noqa: E731
    check_equal(factors({"name": "one_cycle", **options}, steps), stepped(make, steps))


@given(LENGTHS, st.data(), st.floats(0, 1))
def test_step_and_multistep_equal_torchs(steps: int, data: st.DataObject, gamma: float) -> None:
    size = data.draw(st.integers(1, steps - 1))
    expected = stepped(lambda optimizer: torchs.StepLR(optimizer, size, gamma), steps)
    check_equal(factors({"name": "step", "step_size": size, "gamma": gamma}, steps), expected)
    milestones = sorted(data.draw(st.sets(st.integers(1, steps - 1), min_size=1)))
    expected = stepped(lambda optimizer: torchs.MultiStepLR(optimizer, milestones, gamma), steps)
    check_equal(factors({"name": "multistep", "milestones": milestones, "gamma": gamma}, steps), expected)
    warmup = data.draw(st.integers(0, milestones[0]))  # both go on from the first update, and their factors multiply
    found = factors({"name": "multistep", "milestones": milestones, "gamma": gamma}, steps, warmup)
    check_equal(found[warmup:], expected[warmup:])
    assert found[:warmup] == [(update + 1) / (warmup + 1) for update in range(warmup)]


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60), RATIOS, st.floats(0.01, 1))
def test_pieces_equal_torchs_sequence(first: int, second: int, third: int, low: float, high: float) -> None:
    pieces = [
        {"name": "warmup", "steps": first},
        {"name": "cosine", "steps": second, "min_lr_ratio": low},
        {"name": "polynomial", "max_lr_ratio": high, "power": 2.0},
    ]

    def make(optimizer: Optimizer) -> Any:
        last = torchs.LambdaLR(optimizer, lambda update: high * (1 - update / third) ** 2)
        parts = [
            torchs.LinearLR(optimizer, 1 / (first + 1), total_iters=first),
            torchs.CosineAnnealingLR(optimizer, second, low),
            last,
        ]
        return torchs.SequentialLR(optimizer, parts, [first, first + second])

    steps = first + second + third
    check_equal(factors(pieces, steps), stepped(make, steps))


def test_every_schedule_may_be_a_piece() -> None:
    needed = {"wsd": {"decay_steps": 4}, "step": {"step_size": 4}, "multistep": {"milestones": [4]}}
    for name in SCHEDULES:
        alone = {"name": name, **needed.get(name, {})}
        found = factors([{"name": "constant", "steps": 7}, {"steps": 10, **alone}, "linear"], 20)
        assert found == [*[1.0] * 7, *factors(alone, 10), *factors("linear", 3)]
        half = factors([{"max_lr_ratio": 0.5, **alone}], 10)
        assert half == pytest.approx([0.5 * factor for factor in factors(alone, 10)])


def shifted(make: Callable[[Optimizer], Any], steps: int) -> list[float]:
    """Return transformers' rates from the second update on. Its warmup begins with a rate of 0: an update that changes
    nothing. Ours leaves it out, so a warmup and a run of transformers that are one longer have the same rates."""
    return stepped(make, steps + 1)[1:]


@given(LENGTHS, st.integers(0, 40), st.integers(1, 1000))
def test_inverse_sqrt_equals_transformers(length: int, warmup: int, timescale: int) -> None:
    theirs = pytest.importorskip("transformers.optimization")
    steps = warmup + length
    expected = shifted(lambda o: theirs.get_inverse_sqrt_schedule(o, warmup + 1, timescale), steps)
    check_equal(factors({"name": "inverse_sqrt", "timescale": timescale}, steps, warmup), expected)
    if warmup:  # it is the timescale too
        expected = shifted(lambda o: theirs.get_inverse_sqrt_schedule(o, warmup + 1, warmup), steps)
        check_equal(factors("inverse_sqrt", steps, warmup), expected)


@given(LENGTHS, st.integers(0, 40), st.data(), RATIOS, st.sampled_from(["linear", "cosine", "1-sqrt"]))
def test_wsd_equals_transformers(length: int, warmup: int, data: st.DataObject, low: float, decay: str) -> None:
    theirs = pytest.importorskip("transformers.optimization")
    steps, decay_steps = warmup + length, data.draw(st.integers(1, length))
    options = {"decay_type": decay, "min_lr_ratio": low}
    found = factors({"name": "wsd", "decay_steps": decay_steps, **options}, steps, warmup)
    expected = shifted(lambda o: theirs.get_wsd_schedule(o, warmup + 1, decay_steps, steps + 1, **options), steps)
    check_equal(found[warmup:], expected[warmup:])
    # transformers' warmup begins with min_lr_ratio, as ours does in a list of pieces
    if warmup:
        last = {"name": "wsd", "decay_steps": decay_steps, **options}
        check_equal(factors([{"name": "warmup", "steps": warmup, "min_lr_ratio": low}, last], steps), expected)


@given(LENGTHS, st.integers(0, 40), RATIOS)
def test_cosine_and_polynomial_equal_transformers(length: int, warmup: int, low: float) -> None:
    theirs = pytest.importorskip("transformers.optimization")
    steps = warmup + length

    def cosine(optimizer: Optimizer) -> Any:
        return theirs.get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup + 1, steps + 1, min_lr_rate=low)

    check_equal(factors({"name": "cosine", "min_lr_ratio": low}, steps, warmup), shifted(cosine, steps))
    low = min(low, 0.9)  # transformers' must be below 1

    def polynomial(optimizer: Optimizer) -> Any:
        return theirs.get_polynomial_decay_schedule_with_warmup(optimizer, warmup + 1, steps + 1, low, 3.0)

    options = {"name": "polynomial", "power": 3.0, "min_lr_ratio": low}
    check_equal(factors(options, steps, warmup), shifted(polynomial, steps))


STEPS = "train: {steps: 1000}\n"


def load(tmp_path: Path, text: str, *overrides: str) -> Config:
    (tmp_path / "my.yaml").write_text(text)
    return Config.load(tmp_path / "my.yaml", overrides)


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ("cosin", "optim.schedule: 'cosin': input should be constant, linear, cosine"),
        ("cosin", "did you mean cosine?"),
        ("wsd", "optim.schedule.decay_steps: missing, and wsd needs it"),
        ("5", "optim.schedule: 5; give a name, or a section with a name and options, or a list"),
        ("{min_lr_ratio: 0.1}", "optim.schedule.name: missing; give constant, linear"),
        ("{name: wsd, decay_step: 3}", "optim.schedule.decay_step: unknown key, did you mean optim.schedule.decay_st"),
        ("{name: cosine, decay_steps: 3}", "optim.schedule.decay_steps: is for wsd, and the schedule is cosine; leave"),
        ("{name: wsd, decay_steps: -3}", "optim.schedule.decay_steps: -3: input should be greater than 0"),
        ("{name: wsd, decay_steps: 1.5}", "optim.schedule.decay_steps: 1.5: input should be a valid integer"),
        ("{name: wsd, decay_steps: 1001}", "optim.schedule.decay_steps: 1001, but there are 1000 updates; give fewer"),
        ("{name: wsd, decay_steps: 3, decay_type: exp}", "decay_type: 'exp': input should be 'linear', 'cosine' or"),
        ("{name: linear, min_lr_ratio: 1.5}", "optim.schedule.min_lr_ratio: 1.5: input should be less than or equal"),
        ("{name: linear, min_lr_ratio: .nan}", "optim.schedule.min_lr_ratio: nan"),
        ("{name: linear, min_lr_ratio: '0.1'}", "optim.schedule.min_lr_ratio: '0.1': input should be a valid number"),
        ("{name: linear, steps: 4}", "optim.schedule.steps: is for a piece of a list"),
        ("{name: polynomial, power: 0}", "optim.schedule.power: 0: input should be greater than 0"),
        ("{name: multistep, milestones: [5, 3]}", "optim.schedule.milestones: 3 comes after 5; give them in increasin"),
        ("{name: multistep, milestones: [5, 5]}", "optim.schedule.milestones: 5 comes after 5"),
        ("{name: multistep, milestones: [0]}", "optim.schedule.milestones.0: 0: input should be greater than 0"),
        ("{name: multistep, milestones: [5, 1000]}", "optim.schedule.milestones: 1000, but there are 1000 updates"),
        ("{name: step, step_size: 1000}", "optim.schedule.step_size: 1000, but there are 1000 updates, so that the ra"),
        ("{name: step, step_size: 9, gamma: 2}", "optim.schedule.gamma: 2: input should be less than or equal to 1"),
        ("{name: one_cycle, three_phase: true, pct_start: 0.6}", "optim.schedule.pct_start: 0.6, and with three_phase"),
        ("{name: one_cycle, div_factor: 0.5}", "optim.schedule.div_factor: 0.5: input should be greater than or equal"),
        ("warmup", "optim.schedule: warmup is a piece of a list; before another schedule give optim.warmup_steps"),
        ("[]", "optim.schedule: an empty list"),
        ("[5]", "optim.schedule.0: 5; give a name, or a section with a name and options: warmup, constant"),
        ("[warmup, cosine]", "optim.schedule.0.steps: missing; only the last piece may leave it out"),
        ("[{name: warmup, steps: 0}, cosine]", "optim.schedule.0.steps: 0: input should be greater than 0"),
        ("[{name: warmup, steps: 5}, {name: cosine, max_lr: 1}]", "optim.schedule.1.max_lr: unknown key, did you mean"),
        ("[{name: cosine, steps: 9}]", "optim.schedule: the pieces have 9 updates in all, and the run has 1000; leave"),
        ("[{name: cosine, steps: 1001}]", "optim.schedule.0: it begins after 0 updates and ends after 1001, and the"),
        ("[{name: cosine, steps: 1000}, linear]", "optim.schedule.1: it begins after 1000 updates, and the run has 1"),
        ("[{name: linear, min_lr_ratio: 0.2, max_lr_ratio: 0.1}]", "optim.schedule.0.min_lr_ratio: 0.2 is more than"),
        (
            "[{name: constant, steps: 990}, {name: wsd, decay_steps: 11}]",
            "optim.schedule.1.decay_steps: 11, but there ",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path, schedule: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, STEPS, f"optim.schedule={schedule}")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ("one_cycle", "optim.warmup_steps: 100, and one_cycle warms up by itself (optim.schedule.pct_start); leave it"),
        ("{name: wsd, decay_steps: 901}", "decay_steps: 901, but there are 900 updates after the warmup (optim.warmup"),
        ("{name: step, step_size: 99}", "optim.schedule.step_size: 99, but the warmup takes 100 updates"),
        ("{name: multistep, milestones: [99, 500]}", "optim.schedule.milestones: 99, but the warmup takes 100 updates"),
        ("[cosine]", "optim.warmup_steps: 100, and optim.schedule is a list, which has its own warmup; make it the fi"),
    ],
)
def test_what_does_not_fit_with_the_warmup_is_refused(tmp_path: Path, schedule: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, STEPS, "optim.warmup_steps=100", f"optim.schedule={schedule}")
    assert said in str(error.value)


def test_a_run_whose_length_the_data_decide_is_checked_by_its_plan(tmp_path: Path) -> None:
    config = load(tmp_path, "train: {epochs: 2}", "optim.schedule={name: wsd, decay_steps: 5}")
    assert RunPlan.create(config, 1, 160).num_steps == 5
    with pytest.raises(ConfigError, match=r"optim.schedule.decay_steps: 5, but there are 4 updates; give fewer"):
        RunPlan.create(config, 1, 128)


def test_overrides_with_dotted_keys(tmp_path: Path) -> None:
    wsd = load(tmp_path, STEPS, "optim.schedule=wsd", "optim.schedule.decay_steps=100")
    assert wsd == load(tmp_path, STEPS + "optim: {schedule: wsd}", "optim.schedule.decay_steps=100")
    assert wsd == load(
        tmp_path, STEPS + "optim: {schedule: {name: wsd, decay_steps: 9}}", "optim.schedule.decay_steps=100"
    )
    assert (
        load(tmp_path, STEPS + "optim: {schedule: {name: wsd, decay_steps: 9}}", "optim.schedule=cosine").optim.schedule
        == "cosine"
    )
    low = load(tmp_path, STEPS + "optim: {schedule: cosine}", "optim.schedule.min_lr_ratio=0.1")
    assert low.flat()["optim.schedule.min_lr_ratio"] == 0.1
    with pytest.raises(ConfigError, match=r"'optim.schedule.0.steps=3': schedule is a value, not a section"):
        load(tmp_path, STEPS + "optim: {schedule: [cosine]}", "optim.schedule.0.steps=3")


@pytest.mark.parametrize(
    "schedule",
    [
        "cosine",
        "one_cycle",
        "{name: wsd, decay_steps: 9}",
        "{name: multistep, milestones: [3, 9]}",
        "[{name: warmup, steps: 5, min_lr_ratio: 0.1}, {name: step, step_size: 8, max_lr_ratio: 0.5}]",
    ],
)
def test_a_dump_reads_back_to_the_same_schedule(tmp_path: Path, schedule: str) -> None:
    config = load(tmp_path, STEPS, f"optim.schedule={schedule}")
    (tmp_path / "again.yaml").write_text(config.dump())
    again = Config.load(tmp_path / "again.yaml")
    assert again == config
    assert again.identity() == config.identity()


def test_a_schedule_with_its_defaults_is_the_one_of_that_name(tmp_path: Path) -> None:
    by_name = load(tmp_path, STEPS, "optim.schedule=cosine")
    assert by_name.optim.schedule == "cosine"
    for schedule in ("{name: cosine}", "{name: cosine, min_lr_ratio: 0}"):
        assert load(tmp_path, STEPS, f"optim.schedule={schedule}") == by_name
    assert by_name.identity()["optim.schedule"] == "cosine"


def test_the_source_of_a_plain_name_that_gets_an_option(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"{STEPS}optim: {{schedule: cosine}}\n")
    _, rows = Config.load_with_sources(path, ["optim.schedule.min_lr_ratio=0.1"])
    found = {key: source for key, _, source in rows}
    assert found["optim.schedule.name"] == str(path)
    assert found["optim.schedule.min_lr_ratio"] == "command line"
