"""Pods of an indexed Job, as launch/kubernetes.yaml starts them: the tests take command and variables out of that file,
and do what a kubelet would do with them. Where the tests run as root each pod has a network namespace of its own.

No cluster runs here: what Kubernetes does with an exit code is not tested.
"""

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from conftest import (
    ROOT,
    Run,
    check_same,
    environment,
    events,
    free_port,
    lines,
    no_process_left,
    processes_of,
    refused,
    steps_done,
    until,
)
from test_nodes import INSIDE, two_machines

from distrib import World
from distrib.errors import LaunchError

SERVICE, JOB = yaml.safe_load_all((ROOT / "launch" / "kubernetes.yaml").read_text())
SPEC = JOB["spec"]["template"]["spec"]
(CONTAINER,) = SPEC["containers"]
SECRETS = {("digits", "rendezvous-key"): "a secret of the tests"}
IN_EVERY_POD = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}
NOTHING_TO_SAVE = "asked to stop while not training, nothing to save; start it again\n"


def variables(index: int, pod: str) -> dict[str, str]:
    """What the kubelet gives to the container of this pod."""
    found = {**IN_EVERY_POD, "HOSTNAME": f"{JOB['metadata']['name']}-{index}", "JOB_COMPLETION_INDEX": str(index)}
    for variable in CONTAINER["env"]:
        match variable.get("valueFrom"):
            case None:
                value = variable["value"]
            case {"secretKeyRef": {"name": name, "key": key}}:
                value = SECRETS[name, key]
            case {"fieldRef": {"fieldPath": "metadata.name"}}:
                value = pod
            case {"resourceFieldRef": {"resource": "limits.cpu"}}:
                assert CONTAINER["resources"]["limits"]["cpu"].isdecimal()
                value = "1"  # more would only wait for one another here
            case other:
                raise AssertionError(other)
        found[variable["name"]] = value
    return found


@dataclass
class Nodes:
    """Where pods run. `enter`: the command that runs another there; `hosts`: what stands for the cluster's DNS."""

    address: str
    enter: list[list[str]] = field(default_factory=lambda: [[], []])
    hosts: list[Path] = field(default_factory=list)

    def announce(self) -> None:
        """The Service's names become known."""
        name = f"{JOB['metadata']['name']}-0.{SPEC['subdomain']}"
        for hosts in self.hosts:
            hosts.write_text(f"127.0.0.1 localhost\n{self.address} {name}\n")

    def forget(self) -> None:
        for hosts in self.hosts:
            hosts.write_text("127.0.0.1 localhost\n")


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with ExitStack() as stack:
        yield stack.enter_context(two_nodes()) if INSIDE else Nodes("127.0.0.1")


@contextmanager
def two_nodes() -> Iterator[Nodes]:
    """`ip netns exec` puts the files of /etc/netns/SPACE in the place of those in /etc."""
    with two_machines(("10.77.1.1/24", "10.77.1.2/24")) as machines, ExitStack() as stack:
        found = Nodes("10.77.1.1", [machine.enter for machine in machines])
        for machine in machines:
            folder = Path("/etc/netns") / machine.enter[3]
            folder.mkdir(parents=True, exist_ok=True)
            stack.callback(folder.rmdir)
            found.hosts.append(folder / "hosts")
            stack.callback(found.hosts[-1].unlink)
        found.forget()
        yield found


def start(mark: str, folder: Path, nodes: Nodes, attempt: str, **more: str) -> "list[subprocess.Popen[str]]":
    """Both pods of the Job, under the names that they have in this attempt."""
    if not INSIDE:
        more |= {"MASTER_ADDR": nodes.address, "MASTER_PORT": str(free_port())}
    pods = []
    for index, enter in enumerate(nodes.enter):
        env = environment(mark, **{**variables(index, f"digits-{index}-{attempt}"), **more})
        # In its container it is process 1, to which the kernel gives no signal that it does not handle.
        as_process_1 = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"] if INSIDE else []
        pods.append(
            subprocess.Popen(
                [*enter, *as_process_1, *CONTAINER["command"]],
                cwd=folder,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return pods


def terminate(mark: str, index: int) -> None:
    """What the kubelet sends to the first process of a container when its pod is to end."""
    first = min(
        (
            process
            for process in processes_of(mark)
            if process.info["environ"].get("JOB_COMPLETION_INDEX") == str(index)
            and "train" in process.info["cmdline"]
            and "unshare" not in process.info["cmdline"]
        ),
        key=lambda process: process.info["create_time"],
    )
    first.send_signal(signal.SIGTERM)


def ends(pods: "list[subprocess.Popen[str]]", *codes: int) -> list[str]:
    """What they printed as errors, after checking their exit codes."""
    said = [pod.communicate(timeout=100)[1] for pod in pods]
    assert [pod.returncode for pod in pods] == list(codes), said
    return said


def write(folder: Path, **changes: object) -> Path:
    """The config that the manifest's command names."""
    config = {
        "name": "run",
        "task": {"target": "tasks:Slow", "dropout": 0.1},
        "data": {"global_batch_size": 16, "micro_batch_size": 4},
        "train": {"steps": 40},
        "checkpoint": {"every_steps": 0},
    }
    path = folder / CONTAINER["command"][-1]
    path.parent.mkdir()
    path.write_text(yaml.safe_dump({**config, **changes}))
    return folder / "runs" / "run"


def test_the_manifest_fits_together() -> None:
    name, job = JOB["metadata"]["name"], JOB["spec"]
    assert (SERVICE["kind"], SERVICE["apiVersion"]) == ("Service", "v1")
    assert (JOB["kind"], JOB["apiVersion"], job["completionMode"]) == ("Job", "batch/v1", "Indexed")
    assert SERVICE["spec"]["clusterIP"] == "None"  # a word in YAML too, and not null
    assert SERVICE["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert SPEC["subdomain"] == SERVICE["metadata"]["name"]
    env = variables(0, "digits-0-x")
    assert env["MASTER_ADDR"] == f"{name}-0.{SPEC['subdomain']}"
    assert int(env["WORLD_SIZE"]) == job["completions"] == job["parallelism"]
    assert float(env["DISTRIB_GRACE"]) == SPEC["terminationGracePeriodSeconds"]
    assert SPEC["restartPolicy"] == "Never"
    ignored = job["podFailurePolicy"]["rules"][0]
    assert ignored["action"] == "Ignore"
    assert ignored["onExitCodes"] == {"containerName": CONTAINER["name"], "operator": "In", "values": [75]}
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == {volume["name"] for volume in SPEC["volumes"]}
    assert (ROOT / CONTAINER["command"][-1]).exists()


def test_a_pod_that_is_evicted_while_it_trains(mark: str, tmp_path: Path, nodes: Nodes) -> None:
    """Both save and end with 75; their replacements go on, under other names. At first pod 0's name is not known."""
    run = write(tmp_path)
    nodes.forget()
    pods = start(mark, tmp_path, nodes, "abcde")
    if INSIDE:
        with pytest.raises(TimeoutError):
            until(lambda: any(pod.poll() is not None for pod in pods), "a pod does not wait for the name", 4)
    nodes.announce()
    until(lambda: steps_done(run) >= 10, "it does not begin")
    terminate(mark, 1)
    said = ends(pods, 75, 75)
    done = steps_done(run)
    assert f"runs/run: asked to stop; saved after step {done}, start it again to go on" in said[0]
    assert events(run)[-1] == "preempted"
    assert lines(run, "events.jsonl")[-1]["requeue"] is False
    ends(start(mark, tmp_path, nodes, "fghij"), 0, 0)
    assert events(run)[-1] == "finished"
    assert 10 <= done < 40
    first, second = json.loads((run / "environment.json").read_text())["starts"]
    assert (first["launcher"], first["job"], first["world_size"]) == ("kubernetes", "digits", 2)
    assert first["hosts"] == ["digits-0-abcde", "digits-1-abcde"]
    assert second["hosts"] == ["digits-0-fghij", "digits-1-fghij"]
    other = tmp_path / "undisturbed"
    other.mkdir()
    undisturbed = write(other)
    with no_process_left() as beside:
        command = ["distrib", "launch", "--processes", "2", CONTAINER["command"][-1]]
        subprocess.run(command, cwd=other, env=environment(beside), check=True, timeout=100, stdout=subprocess.DEVNULL)
    check_same(run, undisturbed)


def test_pods_that_are_ended_before_they_train(mark: str, tmp_path: Path, nodes: Nodes) -> None:
    """Nothing is lost: exit code 75, so that the Job does not count them as failed."""
    run = write(tmp_path, task={"target": "tasks:Phased", "folder": str(tmp_path)})
    nodes.announce()
    pods = start(mark, tmp_path, nodes, "abcde")
    until((tmp_path / "start-up").exists, "it does not begin")
    for index in (0, 1):
        terminate(mark, index)
    assert set(ends(pods, 75, 75)) == {NOTHING_TO_SAVE}
    assert not run.exists()


def test_pods_of_an_operator_on_one_node(mark: str, tmp_path: Path) -> None:
    """Kubeflow's PyTorchJob gives RANK and no LOCAL_RANK. With `hostNetwork` both have the host name of their node."""
    run = write(tmp_path, train={"steps": 5})
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    pods = []
    for rank, pod in enumerate(("run-master-0", "run-worker-0")):
        env = environment(mark, **IN_EVERY_POD, **job, RANK=str(rank), HOSTNAME="node7", POD_NAME=pod)
        pipe = subprocess.PIPE
        pods.append(subprocess.Popen(CONTAINER["command"], cwd=tmp_path, env=env, stdout=pipe, stderr=pipe, text=True))
    ends(pods, 0, 0)
    (begun,) = json.loads((run / "environment.json").read_text())["starts"]
    assert (begun["launcher"], begun["job"], begun["world_size"]) == ("kubernetes", None, 2)
    assert begun["hosts"] == ["run-master-0", "run-worker-0"]


def test_a_launcher_inside_a_pod_counts() -> None:
    """torchrun or distrib launch, with several processes in each pod."""
    launched = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    world = World.detect({**variables(1, "digits-1-x"), **launched, "DISTRIB_LAUNCHER": "distrib"})
    assert (world.rank, world.local_rank, world.world_size, world.launcher) == (3, 1, 4, "distrib")
    assert (world.host, world.job) == ("digits-1-x", "digits")


def test_a_pod_is_a_rank() -> None:
    world = World.detect(variables(1, "digits-1-x"))
    assert (world.rank, world.local_rank, world.world_size, world.local_world_size) == (1, 0, 2, 1)
    assert (world.launcher, world.host, world.job) == ("kubernetes", "digits-1-x", "digits")


def test_an_index_alone_is_a_run_of_its_own() -> None:
    """A Job whose pods each train another run, such as a sweep."""
    world = World.detect({**IN_EVERY_POD, "JOB_COMPLETION_INDEX": "3", "HOSTNAME": "sweep-3"})
    assert (world.rank, world.world_size, world.launcher, world.job) == (0, 1, "plain", "sweep")


def test_variables_that_are_inherited_from_a_pod_are_no_job() -> None:
    """As in a cluster of another kind that runs inside of pods."""
    assert World.detect(IN_EVERY_POD).scheduler is None
    joined = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert World.detect({**IN_EVERY_POD, **joined}).scheduler is None


@pytest.mark.parametrize("missing", ["WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_a_manifest_that_lacks_a_variable(run: Run, tmp_path: Path, missing: str) -> None:
    write(tmp_path)
    env = {name: value for name, value in variables(1, "digits-1-x").items() if name != missing}
    line = refused(run(*CONTAINER["command"], **env))
    assert f"the Job set JOB_COMPLETION_INDEX but not {missing}; set them in its manifest" in line


def test_an_index_that_is_no_rank() -> None:
    with pytest.raises(LaunchError, match=r"RANK=2 does not lie in 0\.\.1"):
        World.detect(variables(2, "digits-2-x"))
