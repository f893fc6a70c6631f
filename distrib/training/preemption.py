"""Being asked to stop, as a run sees it: by whom, whether there is time to save, and what comes after."""

import signal

from distrib.processes.signals import REQUEUE_SIGNALS
from distrib.processes.world import World


class Preemption:
    """A rank's note of it. The ranks agree on stopping by the sums of their next step."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.asked = False
        self.longest_evaluation = 0.0  # seconds, in which nobody stops
        self._requeue = False
        self._warned = False

    def take_note(self, number: signal.Signals) -> None:
        """All that a signal's handler may do."""
        self.asked = True
        self._requeue |= number in REQUEUE_SIGNALS

    def requeue(self) -> bool:
        """Shall SLURM start the job again? If a rank was sent one of REQUEUE_SIGNALS: SIGTERM is also sent to a
        cancelled job, and SLURM itself requeues what it preempts. Collective."""
        return self.world.job is not None and any(self.world.all_gather_object(self._requeue))

    def too_long(self, save_seconds: float) -> str | None:
        """A warning, once, where a stop would become a kill."""
        grace = self.world.grace
        if self._warned or grace is None or save_seconds + self.longest_evaluation <= grace:
            return None
        self._warned = True
        before = f" and an evaluation before it {self.longest_evaluation:.1f} s" if self.longest_evaluation else ""
        return (
            f"a save takes {save_seconds:.1f} s{before}, but only {grace:g} s lie between being asked to stop and "
            "being killed; give more (--grace, or SLURM's --signal)"
        )
