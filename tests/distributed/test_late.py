"""Steps that are decided on the device, and whose results are read late, as on a GPU. Here the device is a CPU."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cases import LATE_WORLDS
from conftest import results
from tasks import HOW

pytestmark = [pytest.mark.timeout(900), pytest.mark.xdist_group("worlds")]

VERDICTS = {"": "applied", "inf": "skipped:nonfinite_gradient", "nan": "skipped:nonfinite_loss"}
AGAINST_THE_HOST = 1e-4  # the factor of a gradient is rounded to 32 bits before, not after it was computed


@pytest.mark.parametrize("processes", LATE_WORLDS)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("strategy", ["ddp", "zero0", "fsdp2"])
def test_the_device_decides_as_the_host_does(
    world: Callable[[int], Path], strategy: str, optimizer: str, processes: int
) -> None:
    found = results(world(processes))["late"]
    host, device = found[f"{strategy} {optimizer} host"], found[f"{strategy} {optimizer} device"]
    verdicts = [VERDICTS.get(how, "skipped:no_items") for how in HOW]
    assert [step[0] for step in host["steps"]] == [step[0] for step in device["steps"]] == verdicts
    for column in (1, 2):
        values = [[np.nan if step[column] is None else step[column] for step in run["steps"]] for run in (host, device)]
        np.testing.assert_allclose(*values, rtol=AGAINST_THE_HOST)
    np.testing.assert_allclose(device["squares"], host["squares"], rtol=AGAINST_THE_HOST)
    if (strategy, optimizer) == ("fsdp2", "sgd"):  # torch has no fused SGD over shards
        assert device["reads"] == host["reads"]
    else:  # but before SGD's first update, the second step here, which makes its momentum
        assert device["reads"] == (2 if optimizer == "sgd" else 0) < host["reads"]
