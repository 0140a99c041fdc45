"""Grids of runs over many machines, by submitit: a job a run, on this machine or through Slurm."""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlrr_kernels.train.grid.runs import GridRun, check_names, finished_result, run_grid
from rlrr_kernels.train.output.progress import say

if TYPE_CHECKING:
    from submitit import Job

CLUSTERS = ("local", "slurm")

JOBS = "jobs"
"""Folder, in the grid's, of what submitit writes: scripts, pickled runs, logs."""


@dataclasses.dataclass(frozen=True)
class _GridJob:
    """What a job does: one run of the grid; again, from its checkpoint, when the cluster takes its machine away."""

    run: GridRun
    out: Path
    keep_checkpoints: bool

    def __call__(self) -> str:
        from submitit import JobEnvironment
        from submitit.helpers import TorchDistributedEnvironment

        if JobEnvironment().num_tasks > 1:
            TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        run_grid([self.run], self.out, keep_checkpoints=self.keep_checkpoints, quiet=True)
        return self.run.name

    def checkpoint(self) -> Any:
        """Called by submitit in a job that is about to be stopped: it is put into the queue once more."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def submit_grid(
    runs: Iterable[GridRun],
    out: str | Path,
    *,
    cluster: str | None = None,
    at_once: int | None = None,
    keep_checkpoints: bool = True,
    on_result: Callable[[str, dict[str, Any]], None] = lambda name, result: None,
    poll_seconds: float = 10,
    quiet: bool = False,
    **parameters: Any,
) -> dict[str, dict[str, Any]]:
    """Does every run as :func:`rlrr_kernels.train.grid.runs.run_grid` does, each in a job of its own; waits for all.

    ``out``, the images and the weights have to be at the same place on every machine. A job that reaches its time limit
    or loses its machine is queued again and goes on from its checkpoint; when the waiting process itself dies, the same
    call waits for what is left: finished runs are read, the others submitted again (end their old jobs first).

    Args:
        runs: the runs; they and their ``splits`` have to be picklable by cloudpickle.
        out: folder of the grid; ``out/jobs`` gets submitit's files and the logs.
        cluster: ``local``, ``slurm``, or None: Slurm where it is installed.
        at_once: how many jobs may be queued or running at a time; None: all.
        keep_checkpoints, on_result: as for ``run_grid``; ``on_result`` is called here, as runs are done.
        poll_seconds: between two looks at the jobs.
        quiet: print nothing.
        parameters: of a job, by submitit's names: ``timeout_min`` (default 1440), ``gpus_per_node``, ``cpus_per_task``,
            ``mem_gb``, ``slurm_partition``, ...; with ``tasks_per_node`` or ``nodes`` above 1 the processes of a run
            train together, one to a task.

    Returns:
        Name → result document.

    Raises:
        ImportError: submitit is not installed.
        ValueError: as for ``run_grid``, an unknown cluster, or a parameter submitit does not have; before any job.
        ChildProcessError: jobs failed; names their runs, reasons and logs. All other runs have been done.
    """
    runs, out = list(runs), Path(out).resolve()
    check_names([run.name for run in runs])
    if any(run.name.partition("/")[0] == JOBS for run in runs):
        raise ValueError(f"{JOBS!r} is the folder of the logs and cannot hold a run")
    if at_once is not None and at_once < 1:
        raise ValueError(f"at_once must be at least 1; got {at_once}")
    executor = _executor(out / JOBS, cluster, parameters)
    by_name = {run.name: run for run in runs}
    results = {name: result for name, run in by_name.items() if (result := finished_result(run, out)) is not None}
    for name, result in results.items():
        on_result(name, result)
    waiting = [run for run in runs if run.name not in results]
    if not quiet:
        say(f"{len(results)} of {len(runs)} runs are finished, {len(waiting)} to do")
    running: dict[str, Job] = {}
    failed: dict[str, str] = {}
    while waiting or running:
        while waiting and len(running) < (at_once or len(runs)):
            run = waiting.pop(0)
            running[run.name] = executor.submit(_GridJob(run, out, keep_checkpoints))
        time.sleep(poll_seconds)
        for name in [name for name, job in running.items() if job.done()]:
            job = running.pop(name)
            error, result = job.exception(), finished_result(by_name[name], out)
            if result is None:
                failed[name] = f"{_reason(str(error or 'no result'))} (log: {job.paths.stderr})"
            else:
                results[name] = result
                on_result(name, result)
            if not quiet:
                say(f"{name}: {failed.get(name, 'done')}")
    if failed:
        raise ChildProcessError(
            f"{len(failed)} of {len(runs)} runs failed:\n" + "\n".join(f"{name}: {why}" for name, why in failed.items())
        )
    return {run.name: results[run.name] for run in runs}


def job_parameters(texts: Iterable[str]) -> dict[str, Any]:
    """``NAME=VALUE`` texts as keyword arguments of :func:`submit_grid`; whole numbers become numbers.

    Raises:
        ValueError: a text without ``=``.
    """
    parameters: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise ValueError(f"a job's parameter must be NAME=VALUE, such as timeout_min=600; got {text!r}")
        parameters[name.strip()] = int(value) if value.strip().lstrip("-").isdecimal() else value.strip()
    return parameters


def check_cluster(cluster: str | None, parameters: Mapping[str, Any]) -> None:
    """Raises what :func:`submit_grid` raises of these settings, for a look at them before anything is read."""
    _executor(Path(JOBS), cluster, parameters)


def _executor(folder: Path, cluster: str | None, parameters: Mapping[str, Any]) -> Any:
    if cluster is not None and cluster not in CLUSTERS:
        raise ValueError(f"cluster must be one of {', '.join(CLUSTERS)}; got {cluster!r}")
    if importlib.util.find_spec("submitit") is None:
        raise ImportError("jobs need the package submitit, which is not installed: pip install 'rlrr-kernels[cluster]'")
    import submitit

    try:
        executor = submitit.AutoExecutor(folder, cluster=cluster)
        executor.update_parameters(**{"timeout_min": 1440, **parameters})
    except (NameError, RuntimeError, AssertionError) as error:  # what submitit raises of unknown names and no Slurm
        raise ValueError(f"submitit: {error}") from error
    return executor


def _reason(message: str) -> str:
    """What submitit's message comes down to: the last line of the job's traceback, or what it says first."""
    _, dashes, rest = message.partition("-----\n")
    trace = rest.partition("\n-----")[0].strip()
    return trace.splitlines()[-1] if dashes and trace else message.strip().splitlines()[0]
