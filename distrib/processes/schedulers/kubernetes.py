"""Kubernetes: a pod of a Job with an index, or of an operator's job such as Kubeflow's PyTorchJob.

A Job sets JOB_COMPLETION_INDEX; its manifest (launch/kubernetes.yaml) adds WORLD_SIZE, MASTER_ADDR and MASTER_PORT. An
operator sets these three and RANK. Both mean one process in each pod. Other launchers inside the pod start several.
"""

from collections.abc import Mapping

from distrib.errors import LaunchError
from distrib.processes.schedulers.base import Scheduler

_INDEX = "JOB_COMPLETION_INDEX"
_OF_A_JOB = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Kubernetes(Scheduler):
    """A pod. Whether it is started again is decided by the Job from exit codes (docs/kubernetes.md), not from here."""

    name = "kubernetes"
    title = "Kubernetes"
    sigterm_means_stop = True  # a pod is evicted, preempted, or deleted with its Job

    @classmethod
    def detect(cls, environ: Mapping[str, str]) -> bool:
        """The kubelet sets KUBERNETES_SERVICE_HOST in every pod. It may also be inherited where another scheduler runs
        inside of pods, so a variable of a job must be there, too. A launcher inside the pod sets LOCAL_RANK."""
        if "KUBERNETES_SERVICE_HOST" not in environ:
            return False
        by_operator = "WORLD_SIZE" in environ and "MASTER_ADDR" in environ and "LOCAL_RANK" not in environ
        return _INDEX in environ or by_operator

    @property
    def job(self) -> str | None:
        """The host name of an indexed Job's pod is JOB-INDEX, unless the pod has its node's network."""
        job, dash, index = self.environ.get("HOSTNAME", "").rpartition("-")
        return job if dash and index == self.environ.get(_INDEX) else None

    @property
    def host(self) -> str | None:
        """The pod's name. Pods on one node with that node's network (`hostNetwork`) share its host name; the manifest
        sets POD_NAME for them."""
        return self.environ.get("POD_NAME") or self.environ.get("HOSTNAME")

    def rank_variables(self) -> dict[str, str]:
        """A Job with an index that sets none of the other variables is a number of runs, each of one process."""
        environ = self.environ
        if _INDEX not in environ or not any(name in environ for name in _OF_A_JOB):
            return {}
        if missing := [name for name in _OF_A_JOB if name not in environ]:
            raise LaunchError(
                f"the Job set {_INDEX} but not {', '.join(missing)}; set them in its manifest as "
                "launch/kubernetes.yaml does, or none of them"
            )
        return {
            "RANK": environ[_INDEX],
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            **{name: environ[name] for name in _OF_A_JOB},
        }
