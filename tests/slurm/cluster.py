"""A real SLURM cluster of two nodes on this machine: Debian's daemons, its own configuration, ports and folders.

Needs root and the packages slurm-wlm and munge; .ci/run installs them.
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import conftest
import psutil

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol")
NODES = ("n1", "n2")
HOSTS = Path("/etc/hosts")
MUNGE_KEY = Path("/etc/munge/munge.key")

CONF = """
ClusterName=distrib
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldPort={ports[0]}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1
MpiDefault=none
JobRequeue=1
KillWait=20
ReturnToService=2
SlurmdTimeout=600
OverTimeLimit=0
MailProg=/bin/true
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 State=UNKNOWN
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:8
"""


def missing() -> str:
    """Why there can be no cluster here, or nothing."""
    if absent := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"{', '.join(absent)} not found"
    return "" if os.geteuid() == 0 else "the daemons run as root"


@dataclass
class Cluster:
    """`environment` is what its commands need."""

    folder: Path
    environment: dict[str, str]

    def command(self, *arguments: object, **kwargs: Any) -> str:
        """The output of a command of SLURM's."""
        result = subprocess.run(
            [str(argument) for argument in arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            **kwargs,
        )
        assert result.returncode == 0, f"{arguments}\n{result.stdout}\n{result.stderr}"
        return result.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of it."""
        words = self.command("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)


@contextmanager
def running_cluster(folder: Path, mark: str) -> Iterator[Cluster]:
    """Start the daemons, wait until both nodes are idle; at the end everything is stopped. `mark`: of all processes,
    those of jobs too."""
    (folder / "state").mkdir(parents=True)
    host = socket.gethostname()
    (folder / "slurm.conf").write_text(CONF.format(host=host, folder=folder, ports=_free_ports(3)))
    environment = conftest.environment(mark, SLURM_CONF=str(folder / "slurm.conf"))
    cluster = Cluster(folder, environment)
    daemons: list[subprocess.Popen[bytes]] = []

    def start(*command: str) -> None:
        log = (folder / f"{Path(command[0]).name}-{len(daemons)}.out").open("wb")
        daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))

    with _names_of_the_nodes():
        try:
            if not MUNGE_KEY.exists():
                subprocess.run(["mungekey", "--create"], check=True)
            start(
                "munged",
                "--foreground",
                "--force",
                f"--socket={folder}/munge.socket",
                f"--pid-file={folder}/munged.pid",
                f"--log-file={folder}/munged.log",
                f"--seed-file={folder}/munged.seed",
            )
            start("slurmctld", "-D")
            for node in NODES:
                start("slurmd", "-D", "-N", node)
            deadline = time.monotonic() + 60
            while True:
                with suppress(AssertionError):
                    states = cluster.command("sinfo", "--noheader", "--Node", "--format=%T").split()
                    if states == ["idle"] * len(NODES):
                        break
                assert time.monotonic() < deadline, f"the cluster does not come up, see {folder}"
                time.sleep(0.2)
            yield cluster
        finally:
            with suppress(Exception):
                cluster.command("scancel", "--user=root", "--signal=KILL", "--full")
                cluster.command("scancel", "--user=root")
            for daemon in reversed(daemons):
                _end(daemon)


def _end(daemon: "subprocess.Popen[bytes]") -> None:
    """With whatever it started."""
    with suppress(psutil.NoSuchProcess):
        children = psutil.Process(daemon.pid).children(recursive=True)
        daemon.terminate()
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()


@contextmanager
def _names_of_the_nodes() -> Iterator[None]:
    """n1 and n2 resolve to this machine, as a cluster's names do."""
    before = HOSTS.read_text()
    HOSTS.write_text(f"{before.rstrip()}\n127.0.0.1 {' '.join(NODES)}\n")
    try:
        yield
    finally:
        HOSTS.write_text(before)


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for probe in sockets:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in sockets]
    for probe in sockets:
        probe.close()
    return ports
