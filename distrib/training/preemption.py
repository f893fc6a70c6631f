"""Handles a request to stop: notes the signal, checks the time left to save, and decides whether SLURM requeues."""

import signal
from typing import NoReturn

from distrib.errors import Preempted
from distrib.monitor.run_log import RunLog
from distrib.processes.schedulers.base import Requeue, requeue
from distrib.processes.signals import REQUEUE_SIGNALS
from distrib.processes.world import World


class Preemption:
    """Notes a request to stop on this rank. It reaches all ranks with the sums of the next step."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.asked = False
        self._requeue = False
        self._warned = False

    def take_note(self, number: signal.Signals) -> None:
        """Note a signal. Safe to call in a signal handler."""
        self.asked = True
        self._requeue |= number in REQUEUE_SIGNALS

    def requeue(self) -> Requeue | None:
        """Have the scheduler start the job again if it can and a rank was sent one of REQUEUE_SIGNALS; None if not.

        SIGTERM does not count: it is also sent to a cancelled job, and what a scheduler preempts it starts again by
        itself. Collective; to be called when all is saved."""
        asked, scheduler = any(self.world.all_gather_object(self._requeue)), self.world.scheduler
        return self.world.on_rank_0(
            lambda: requeue(scheduler) if asked and scheduler is not None and scheduler.can_requeue else None
        )

    def too_long(self, save_seconds: float, evaluation_seconds: float) -> str | None:
        """Return a warning, once, if a save may take longer than the time between a signal and the kill.

        `evaluation_seconds`: of the longest evaluation so far, during which a run does not stop.
        """
        grace = self.world.grace
        if self._warned or grace is None or save_seconds + evaluation_seconds <= grace:
            return None
        self._warned = True
        before = f" and an evaluation before it {evaluation_seconds:.1f} s" if evaluation_seconds else ""
        return (
            f"a save takes {save_seconds:.1f} s{before}, but a run is killed {grace:g} s after it is asked to stop; "
            "allow more time (--grace, or what the scheduler calls it)"
        )

    def end(self, run_log: RunLog, steps_done: int) -> NoReturn:
        """Have the job requeued if it can be, log the end, and raise Preempted. Call it after a save. Collective."""
        requeue = self.requeue()  # before a task ends: the scheduler may end the others then
        run_log.event("preempted", step=steps_done, requeue=requeue is not None and requeue.done)
        stopped = f"{run_log.run.path}: asked to stop; saved after step {steps_done}"
        if requeue is not None:
            run_log.say(f"{stopped}, {requeue.message}")
        run_log.close("preempted")
        self.world.shutdown()
        raise Preempted(stopped if requeue is not None else f"{stopped}, start it again to go on")
