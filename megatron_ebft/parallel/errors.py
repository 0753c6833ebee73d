"""An error on one rank becomes an error on every rank, so that no rank waits for another forever."""

import contextlib

import torch.distributed as dist

from megatron_ebft.common.disk import is_passing


@contextlib.contextmanager
def collective_errors():
    """Run a block on every rank; an error on one rank is raised on all. Also a barrier.

    Raises:
        ValueError: on every rank, if any rank raised one.
        OSError: on every rank, if any rank had a passing one (common/disk.py): others may then see no files at all.
        RuntimeError: on the other ranks, if a rank raised anything else (which continues there).
    """
    problem = None
    try:
        yield
    except Exception as error:
        problem = error
    reports = [None] * dist.get_world_size()
    number = problem.errno if is_passing(problem) else None
    is_expected = number is not None or isinstance(problem, ValueError)
    text = f"{problem.strerror if number else problem}"
    dist.all_gather_object(reports, problem and (is_expected, number, text))
    problems = [(rank, *report) for rank, report in enumerate(reports) if report]
    unexpected = [f"rank {rank}: {text}" for rank, is_expected, _, text in problems if not is_expected]
    if problem is not None and not is_expected:
        raise problem
    if unexpected:
        raise RuntimeError(unexpected[0]) from problem
    for rank, _, number, text in problems:
        if number is not None:
            raise OSError(number, f"rank {rank}: {text}") from problem
    if problems:
        raise ValueError(problems[0][3]) from problem
