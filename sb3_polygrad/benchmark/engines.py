"""Who carries out the runs of a comparison, driven by joblib: processes of this machine, or the workers of a Dask cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from joblib import parallel_config
from joblib.externals.loky.process_executor import TerminatedWorkerError


class Engine(Protocol):
    """Whoever ``joblib.Parallel`` is to hand its jobs to."""

    death: type[Exception]
    """What ``joblib.Parallel`` raises when whoever had a job was killed, too often."""

    def at_work(self) -> AbstractContextManager[object]:
        """In this context ``joblib.Parallel`` has the engine carry out its jobs."""
        ...


class Processes:
    """
    Processes of this machine.

    :param jobs: how many
    :param threads: of OpenMP in each; it reads their number when a process begins, so their environment says it
    """

    death = TerminatedWorkerError

    def __init__(self, jobs: int, threads: int) -> None:
        self.jobs, self.threads = jobs, threads

    def at_work(self) -> AbstractContextManager[object]:
        """See :class:`Engine`."""
        return parallel_config("loky", n_jobs=self.jobs, inner_max_num_threads=self.threads)


class DaskCluster:
    """
    Workers of a Dask cluster, on any number of machines that see the same folders under the same names.

    :param scheduler: its address, ``tcp://HOST:8786``
    :raises ImportError: without the package ``distributed``
    """

    def __init__(self, scheduler: str) -> None:
        from distributed import KilledWorker  # here only: an extra of its own

        self.scheduler = scheduler
        self.death: type[Exception] = KilledWorker

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """
        See :class:`Engine`.

        :raises RuntimeError: if a worker would have several runs in one process, which share torch's random numbers
        """
        from distributed import Client

        with Client(self.scheduler) as client:
            if any(threads > 1 for threads in client.nthreads().values()):
                raise RuntimeError(
                    f"--dask {self.scheduler}: a worker has several threads, so several runs would share one process and "
                    "its random numbers: begin them with `dask worker ... --nthreads 1` (and --nworkers for several)"
                )
            with parallel_config("dask"):
                yield
