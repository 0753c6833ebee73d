"""An error on one rank becomes an error on every rank, so that no rank waits for another forever."""

import contextlib

import torch.distributed as dist


@contextlib.contextmanager
def collective_errors():
    """Run a block on every rank; an error on one rank is raised on all. Also a barrier.

    Raises:
        ValueError: on every rank, if any rank raised one.
        RuntimeError: on the other ranks, if a rank raised anything else (which continues there).
    """
    problem = None
    try:
        yield
    except Exception as error:
        problem = error
    reports = [None] * dist.get_world_size()
    dist.all_gather_object(reports, problem and (isinstance(problem, ValueError), f"{problem}"))
    problems = [(rank, *report) for rank, report in enumerate(reports) if report]
    unexpected = [f"rank {rank}: {text}" for rank, is_expected, text in problems if not is_expected]
    if problem is not None and not isinstance(problem, ValueError):
        raise problem
    if unexpected:
        raise RuntimeError(unexpected[0]) from problem
    if problems:
        raise ValueError(problems[0][2]) from problem
