"""Who carries out the runs of a comparison: processes of this machine (joblib), or the workers of a Dask cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from joblib import Parallel, delayed, parallel_config
from joblib.externals.loky.process_executor import TerminatedWorkerError

Result = tuple[str, str, str | None]
"""Name of a run, what was done, and the error that ended it, if one did."""

Job = Callable[[], Result]
"""Brings a run as far as it comes; it can be sent to another process, and raises nothing."""

MAX_DEATHS = 3
"""Times that processes of one call may be killed before what is left is given up."""


class Engine(Protocol):
    """Whoever carries out jobs."""

    def results(self, jobs: Mapping[str, Job]) -> Iterator[Result]:
        """
        :param jobs: by the names of their runs
        :return: their results, in the order in which they end; also of those whose process was killed
        """
        ...


class Processes:
    """
    Processes of this machine.

    :param n_processes: how many at a time
    :param threads: of OpenMP in each; it reads their number when a process begins, so their environment says it
    """

    def __init__(self, n_processes: int, threads: int) -> None:
        self.n_processes, self.threads = n_processes, threads

    def results(self, jobs: Mapping[str, Job]) -> Iterator[Result]:
        """
        See :class:`Engine`.

        When a process is killed (by a lack of memory, say), all others end too, and joblib does not know which job it had:
        those that are not done are begun again in new processes; after :data:`MAX_DEATHS` they are given up.
        """
        left = dict(jobs)
        for _ in range(MAX_DEATHS):
            with parallel_config("loky", n_jobs=self.n_processes, inner_max_num_threads=self.threads):
                parallel = Parallel(batch_size=1, pre_dispatch="all", return_as="generator_unordered")
                try:
                    for result in parallel([delayed(job)() for job in left.values()]):
                        del left[result[0]]
                        yield result
                    return
                except TerminatedWorkerError as error:
                    reason = str(error)
        yield from ((name, "failed: a process was killed", reason) for name in left)


class DaskCluster:
    """
    Workers of a Dask cluster, on any number of machines that see the same folders under the same names.

    Dask itself gives what a killed worker had to another, and gives up what has killed several.

    :param scheduler: its address, ``tcp://HOST:8786``
    """

    def __init__(self, scheduler: str) -> None:
        self.scheduler = scheduler

    def results(self, jobs: Mapping[str, Job]) -> Iterator[Result]:
        """
        See :class:`Engine`.

        :raises ImportError: without the package ``distributed``
        :raises OSError: if there is no scheduler at this address
        """
        try:
            from distributed import Client, as_completed  # here only: an extra of its own
        except ImportError as error:
            raise ImportError('--dask needs the package distributed: pip install -c constraints.txt ".[dask]"') from error

        with Client(self.scheduler) as client:
            names = {client.submit(_alone, job, pure=False): name for name, job in jobs.items()}
            for future in as_completed(names):
                fault = future.exception()
                reason = f"{type(fault).__name__}: {fault}"
                yield future.result() if fault is None else (names[future], f"failed: {reason}", reason)


def _alone(job: Job) -> Result:
    """A job on a worker that has no other at the same time: they would share torch's random numbers."""
    from distributed import get_worker

    if get_worker().state.nthreads > 1:
        raise RuntimeError(
            "the worker has several threads: begin it with `dask worker ... --nthreads 1` (--nworkers for several)"
        )
    return job()
