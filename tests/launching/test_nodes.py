"""Several machines without a scheduler: a launcher on each, in network namespaces of their own where the tests run as
root, else on loopback."""

import ipaddress
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest
import warm
import yaml
from conftest import (
    Run,
    check,
    check_same,
    environment,
    events,
    free_port,
    lines,
    no_process_left,
    processes_of,
    refused,
    starter,
    steps_done,
    until,
)
from conftest import start as beside

from distrib.processes.network import endpoint

pytestmark = pytest.mark.xdist_group("nodes")  # one process makes the machines

CONFIG = {
    "name": "run",
    "task": {"target": "tasks:Slow", "dropout": 0.1},
    "data": {"global_batch_size": 16, "micro_batch_size": 4},
    "train": {"steps": 120},
    "checkpoint": {"every_steps": 10},
}
KEY = "a secret of the tests"
INSIDE = os.geteuid() == 0 and shutil.which("ip") is not None  # namespaces can be made


@dataclass
class Machine:
    """`enter`: the command that runs another there."""

    host: str
    enter: list[str]
    _server: "warm.Server | None" = None

    def server(self) -> "warm.Server":
        """Processes on this machine are forked by one that is there."""
        if self._server is None:
            self._server = warm.Server.start(environment(""), self.enter)
        return self._server

    def leave(self) -> None:
        if self._server is not None:
            self._server.close()


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@pytest.fixture(scope="module")
def machines() -> Iterator[tuple[list[Machine], str]]:
    """Two of them, and the address of the first."""
    if not INSIDE:
        here = socket.gethostname()
        both = [Machine(here, []), Machine(here, [])]
        yield both, "127.0.0.1"
        for machine in both:
            machine.leave()
        return
    with two_machines(("10.77.0.1/24", "10.77.0.2/24")) as both:
        yield both, "10.77.0.1"


@contextmanager
def two_machines(addresses: tuple[str, str]) -> Iterator[list[Machine]]:
    """Network namespaces that reach one another by these addresses."""
    name = f"{os.getpid() % 10**5}{'ab'[':' in addresses[0]]}"
    machines: list[Machine] = []
    spaces, links = ([f"{kind}{name}-{number}" for number in (0, 1)] for kind in ("distrib-", "d"))
    try:
        for space in spaces:
            ip("netns", "add", space)
        ip("link", "add", links[0], "type", "veth", "peer", "name", links[1])
        for space, link, address in zip(spaces, links, addresses, strict=True):
            ip("link", "set", link, "netns", space)
            ip("-n", space, "addr", "add", address, "dev", link, *(["nodad"] if ":" in address else []))
            ip("-n", space, "link", "set", link, "up")
            ip("-n", space, "link", "set", "lo", "up")
        machines += [
            Machine(
                f"node{number}",
                [
                    *("ip", "netns", "exec", space, "unshare", "--uts"),
                    *("sh", "-c", f'hostname node{number}; exec "$@"', "sh"),
                ],
            )
            for number, space in enumerate(spaces)
        ]
        yield machines
    finally:
        for machine in machines:
            machine.leave()
        for space in spaces:
            subprocess.run(["ip", "netns", "del", space], check=False)


Start = Callable[..., "list[subprocess.Popen[str]]"]


def launch_on(
    machines: list[Machine], address: str, mark: str, folder: Path, *arguments: object, own: Any = ((), ()), **env: str
) -> "list[subprocess.Popen[str]]":
    """The same on both machines, each with what `own` says for it."""
    where = endpoint(address, free_port())
    launchers = []
    for rank, machine in enumerate(machines):
        options = ["--nodes", 2, "--node-rank", rank, "--rendezvous", where]
        command = [sys.executable, "-m", "distrib", "launch", *options, *arguments, *own[rank]]
        launchers.append(
            warm.Popen(
                [str(part) for part in command],
                server=machine.server(),
                cwd=folder,
                env=environment(mark, DISTRIB_RENDEZVOUS_KEY=KEY, **env),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return launchers


@pytest.fixture
def start(mark: str, tmp_path: Path, machines: tuple[list[Machine], str]) -> Start:
    """`start(CONFIG, …)`: `launch_on` the machines, in the test's folder."""
    return partial(launch_on, *machines, mark, tmp_path)


def write(folder: Path, **changes: object) -> Path:
    (folder / "run.yaml").write_text(yaml.safe_dump({**CONFIG, **changes}))
    return folder / "runs" / "run"


def launcher_of(process: "subprocess.Popen[str]") -> psutil.Process:
    """`ip netns exec` and `unshare` become what they start."""
    return psutil.Process(process.pid)


def listeners(mark: str) -> set[tuple[str, int]]:
    """Addresses and ports at which our processes listen. A process that ends meanwhile (wandb starts such) has none."""
    found = set()
    for process in processes_of(mark):
        with suppress(psutil.NoSuchProcess):
            found |= {one.laddr for one in process.net_connections("inet") if one.status == psutil.CONN_LISTEN}
    return {(address.ip, address.port) for address in found}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on two processes of one machine."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run = write(folder)
    with no_process_left() as mark:
        check(starter(mark, folder)("distrib", "launch", "--processes", 2, "run.yaml"))
    return run


@pytest.mark.parametrize("killed", [0, 1])
def test_a_launcher_is_killed(
    start: Start, tmp_path: Path, machines: tuple[list[Machine], str], undisturbed: Path, killed: int
) -> None:
    """The other machine notices, says whom it lost, and leaves nothing running; started again, both go on."""
    run = write(tmp_path)
    launchers = start("run.yaml")
    until(lambda: steps_done(run) >= 15, "it does not begin")
    launcher_of(launchers[killed]).kill()
    _, said = launchers[1 - killed].communicate(timeout=60)
    assert launchers[1 - killed].returncode == 1
    launchers[killed].communicate(timeout=60)
    lost = machines[0][killed].host
    expected = (
        f"lost contact with rank 1 of 2 on {lost}" if killed else f"lost contact with node 0's launcher on {lost}"
    )
    assert expected in said
    assert "Traceback" not in said
    again = start("run.yaml")
    assert [(launcher.communicate(timeout=100), launcher.returncode)[1] for launcher in again] == [0, 0]
    assert "resumed" in events(run)
    check_same(run, undisturbed)
    assert lines(run)[-1]["world_size"] == 2


def test_a_signal_to_one_launcher_stops_both(
    start: Start, tmp_path: Path, machines: tuple[list[Machine], str], undisturbed: Path
) -> None:
    """And while they train nothing listens on an interface that does not lead to the others."""
    run = write(tmp_path)
    launchers = start("run.yaml")
    until(lambda: steps_done(run) >= 15, "it does not begin")
    if INSIDE:
        for number, machine in enumerate(machines[0]):
            command = [*machine.enter, "ss", "--no-header", "--listening", "--tcp", "--numeric"]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            addresses = {line.split()[3].rpartition(":")[0] for line in said.splitlines()}
            assert addresses == {"127.0.0.1", f"10.77.0.{number + 1}"}  # stores and relays; the gate and gloo
    launcher_of(launchers[1]).send_signal(signal.SIGTERM)
    said = [launcher.communicate(timeout=60)[1] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [75, 75], said
    assert events(run)[-1] == "preempted"
    again = start("run.yaml")
    assert [(launcher.communicate(timeout=100), launcher.returncode)[1] for launcher in again] == [0, 0]
    check_same(run, undisturbed)


def test_both_start_again_after_a_crash(
    start: Start, tmp_path: Path, mark: str, machines: tuple[list[Machine], str], undisturbed: Path
) -> None:
    run = write(tmp_path)
    launchers = start("--max-restarts", 1, "run.yaml")
    until(lambda: steps_done(run) >= 15, "it does not begin")
    (rank,) = (process for process in processes_of(mark) if process.info["environ"].get("RANK") == "1")
    rank.kill()
    said = [launcher.communicate(timeout=100)[1] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], said
    assert "rank 1 was ended by SIGKILL (out of memory?); starting all again, restart 1 of 1" in said[1]
    check_same(run, undisturbed)


@pytest.mark.skipif(not INSIDE, reason="cutting a machine off needs root and iproute2")
@pytest.mark.timeout(240)
def test_a_machine_is_cut_off(start: Start, tmp_path: Path, machines: tuple[list[Machine], str]) -> None:
    """No connection is closed, as when the power fails: the silence is noticed within 60 s."""
    run = write(tmp_path, train={"steps": 100_000})
    launchers = start("run.yaml")
    until(lambda: steps_done(run) >= 15, "it does not begin")
    space = machines[0][1].enter[3]
    link = subprocess.run(["ip", "-n", space, "-o", "link"], capture_output=True, text=True, check=True).stdout
    (name,) = (word.split("@")[0] for word in link.split() if word.startswith("d") and "@" in word)
    ip("-n", space, "link", "set", name, "down")
    try:
        _, said = launchers[0].communicate(timeout=100)
        assert launchers[0].returncode == 1
        assert "rank 0 of 2 on node0 stopped: rank 1 of 2 on node1 has not been heard of for 60 s" in said
        launchers[1].communicate(timeout=100)  # what it can still say depends on who notices first, rank or launcher
        assert launchers[1].returncode == 1
    finally:
        ip("-n", space, "link", "set", name, "up")


def test_another_config_on_one_machine(start: Start, tmp_path: Path, machines: tuple[list[Machine], str]) -> None:
    run = write(tmp_path)
    launchers = start("run.yaml", own=([], ["optim.lr=0.5"]))
    said = [launcher.communicate(timeout=100)[1] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [2, 2]
    first, second = (machine.host for machine in machines[0])
    expected = f"error: rank 1 of 2 on {second} has another config than rank 0 on {first}: optim.lr is 0.5, there 0.001"
    assert expected in said[0]
    assert not run.exists()


def test_a_run_folder_that_one_machine_does_not_see(
    start: Start, tmp_path: Path, machines: tuple[list[Machine], str]
) -> None:
    """Each has a folder of its own under that name, as without a shared file system."""
    write(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    launchers = start("run.yaml", own=(["--run-dir", "here/run"], ["--run-dir", "there/run"]))
    said = [launcher.communicate(timeout=100)[1] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [2, 2]
    assert f"error: rank 1 of 2 on {machines[0][1].host} does not see {tmp_path}/there/run/environment.json" in said[0]


def test_other_versions_on_one_machine(start: Start, tmp_path: Path, machines: tuple[list[Machine], str]) -> None:
    run = write(tmp_path)
    other = tmp_path / "other" / "numpy-0.1.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 0.1\n")
    script = tmp_path / "with_other.py"
    script.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(tmp_path / 'other')!r}) if os.environ['RANK'] == '1' else None\n"
        "from distrib import Config, Trainer\n"
        "from tasks import Slow\n"
        "Trainer(Slow(), Config.load('run.yaml')).fit()\n"
    )
    launchers = start(script)
    said = [launcher.communicate(timeout=100)[1] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [2, 2]
    assert f"error: rank 1 on {machines[0][1].host} has numpy 0.1, rank 0 on {machines[0][0].host} has " in said[0]
    assert not run.exists()


def test_one_machine_listens_on_loopback_alone(mark: str, tmp_path: Path) -> None:
    """Launcher, ranks, workers and wandb; what comes in there that is none of theirs does no harm."""
    data = {"global_batch_size": 16, "micro_batch_size": 4, "num_workers": 1}
    run = write(tmp_path, train={"steps": 100_000}, data=data)
    launcher = beside(mark, tmp_path, "launch", "--processes", 2, "run.yaml", WANDB_MODE="offline")
    until(lambda: steps_done(run) >= 15, "it does not begin")
    found = listeners(mark)
    assert found
    assert [where for where in found if not ipaddress.ip_address(where[0]).is_loopback] == []
    random = Random(0)
    for address, port in found:
        for size in (0, 1, 7, 64, 1000, 65536):
            with suppress(OSError), socket.create_connection((address, port), timeout=5) as stranger:
                stranger.sendall(random.randbytes(size))
    done = steps_done(run)
    until(lambda: steps_done(run) >= done + 15, "it does not go on")
    launcher.send_signal(signal.SIGTERM)
    said = launcher.communicate(timeout=60)
    assert launcher.returncode == 75, said


def test_a_rank_that_never_comes(mark: str, run: Run, tmp_path: Path) -> None:
    """Under a launcher that does not care, here none at all."""
    write(tmp_path)
    port = str(free_port())
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    line = refused(run("distrib", "train", "run.yaml", **alone, DISTRIB_JOIN_TIMEOUT="3"))
    assert "rank 1 of 2 did not join within 3 s; the others are on" in line
    other = {**alone, "RANK": "1"}
    result = run("distrib", "train", "run.yaml", **other, DISTRIB_JOIN_TIMEOUT="3")
    assert result.returncode == 2
    assert f"rendezvous at 127.0.0.1:{port} failed: no answer within 3 s (Connection refused)" in result.stderr


def test_ranks_without_a_launcher_prove_the_key_too(mark: str, run: Run, tmp_path: Path) -> None:
    """As srun starts them: rank 0 keeps store and gate. By IPv6, where there is any."""
    folder, port = write(tmp_path, train={"steps": 5}), free_port()
    address = "::1" if any(one.address == "::1" for one in psutil.net_if_addrs().get("lo", ())) else "127.0.0.1"
    env = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": "2"}
    env |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    first = beside(mark, tmp_path, "train", "run.yaml", RANK="0", DISTRIB_RENDEZVOUS_KEY=KEY, **env)
    result = run("distrib", "train", "run.yaml", RANK="1", DISTRIB_RENDEZVOUS_KEY="another key than theirs", **env)
    assert result.returncode == 2
    assert f"rendezvous at {endpoint(address, port)} refused: rank 0 has another key" in result.stderr
    check(run("distrib", "train", "run.yaml", RANK="1", DISTRIB_RENDEZVOUS_KEY=KEY, **env))
    said = first.communicate(timeout=60)
    assert first.returncode == 0, said
    assert {line["world_size"] for line in lines(folder)} == {2}
    assert not any(KEY in path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file())


def test_two_that_say_they_are_the_same_rank(mark: str, tmp_path: Path) -> None:
    write(tmp_path)
    variables = {"LOCAL_RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = ["train", "run.yaml", "data.micro_batch_size=1", "data.global_batch_size=15"]
    started = [
        beside(mark, tmp_path, *command, RANK=rank, **variables, DISTRIB_JOIN_TIMEOUT="8") for rank in ("0", "1", "1")
    ]
    said = [process.communicate(timeout=60)[1] for process in started]
    assert [process.returncode for process in started] == [2, 2, 2]
    assert "rank 2 of 3 did not join within 8 s" in said[0]
    assert "two processes have been started as rank 1 of 3" in said[1] + said[2]


def test_a_machine_that_never_comes(run: Run, tmp_path: Path) -> None:
    write(tmp_path)
    where = ["--nodes", 2, "--rendezvous", f"127.0.0.1:{free_port()}", "--join-timeout", 3]
    line = refused(run("distrib", "launch", *where, "--node-rank", 0, "run.yaml", DISTRIB_RENDEZVOUS_KEY=KEY))
    assert "not all of 2 nodes came to 127.0.0.1:" in line
    line = refused(run("distrib", "launch", *where, "--node-rank", 1, "run.yaml", DISTRIB_RENDEZVOUS_KEY=KEY))
    assert "no answer within 3 s (Connection refused); node 0's distrib launch should listen there" in line


def test_a_launcher_that_waits_for_node_0_is_asked_to_stop(mark: str, tmp_path: Path) -> None:
    write(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it accepts, and says nothing
        where = ["--nodes", 2, "--node-rank", 1, "--rendezvous", f"127.0.0.1:{silent.getsockname()[1]}"]
        for number in (signal.SIGTERM, signal.SIGINT):
            launcher = beside(mark, tmp_path, "launch", *where, "run.yaml", DISTRIB_RENDEZVOUS_KEY=KEY)
            connection, _ = silent.accept()
            with connection:
                launcher.send_signal(number)
                _, said = launcher.communicate(timeout=60)
            assert (launcher.returncode, said) == (
                75,
                "asked to stop while not training, nothing to save; start it again\n",
            )


def test_two_on_one_host_although_there_is_no_local_rank(mark: str, tmp_path: Path) -> None:
    run = write(tmp_path)
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    both = [beside(mark, tmp_path, "train", "run.yaml", RANK=rank, **env) for rank in ("0", "1")]
    said = [process.communicate(timeout=60)[1] for process in both]
    assert [process.returncode for process in both] == [2, 2]
    assert f"ranks 0 and 1 are both on {socket.gethostname()}, but LOCAL_RANK is not set" in said[0]
    assert not run.exists()


@pytest.mark.skipif(not INSIDE, reason="a machine without IPv4 needs root and iproute2")
def test_machines_that_have_ipv6_alone(mark: str, tmp_path: Path) -> None:
    run = write(tmp_path, train={"steps": 5})
    with two_machines(("fd77::1/64", "fd77::2/64")) as machines:
        launchers = launch_on(machines, "fd77::1", mark, tmp_path, "run.yaml")
        said = [launcher.communicate(timeout=100) for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], said
    assert {line["world_size"] for line in lines(run)} == {2}


def test_two_machines_with_the_same_node_rank(mark: str, tmp_path: Path) -> None:
    write(tmp_path)
    where = ["--nodes", "3", "--rendezvous", f"127.0.0.1:{free_port()}"]
    command = [*where, "run.yaml", "data.micro_batch_size=1", "data.global_batch_size=15"]
    started = [
        beside(mark, tmp_path, "launch", "--node-rank", rank, *command, DISTRIB_RENDEZVOUS_KEY=KEY)
        for rank in ("0", "1", "1")
    ]
    said = [process.communicate(timeout=60)[1] for process in started]
    assert [process.returncode for process in started] == [2, 2, 2], said
    here = socket.gethostname()
    for one in said:
        assert f"--node-rank: launchers on {here} and {here} both gave 1; give each node its own, 0 to 2" in one


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nodes", 2], "so give --node-rank R (0 to 1) and --rendezvous HOST:PORT of node 0"),
        (["--nodes", 2, "--node-rank", 2, "--rendezvous", "a:1"], "--node-rank: 2, give 0 to 1"),
        (["--nodes", 2, "--node-rank", 1, "--rendezvous", "a"], "--rendezvous: 'a', give HOST:PORT of node 0"),
        (["--nodes", 2, "--node-rank", 1, "--rendezvous", "fd00::1:29500"], "an IPv6 address as [ADDRESS]:PORT"),
        (["--nodes", 2, "--node-rank", 1, "--rendezvous", "a:1", "--rendezvous-key", "abc"], "it has 3 characters"),
        (["--rendezvous", "a:1"], "--node-rank and --rendezvous are for several machines; give --nodes N too"),
        (
            ["--nodes", 2, "--node-rank", 1, "--rendezvous", "nowhere.invalid:1", "--join-timeout", 1],
            "no answer within",
        ),
    ],
)
def test_what_is_refused(run: Run, tmp_path: Path, arguments: list[object], said: str) -> None:
    write(tmp_path)
    assert said in refused(run("distrib", "launch", *arguments, "run.yaml", DISTRIB_RENDEZVOUS_KEY=KEY))


def test_several_machines_need_a_key(run: Run, tmp_path: Path) -> None:
    write(tmp_path)
    where = ["--nodes", 2, "--node-rank", 0, "--rendezvous", "a:1"]
    line = refused(run("distrib", "launch", *where, "run.yaml"))
    assert "--rendezvous-key: --nodes 2 needs a secret, the same on all machines" in line
