"""An error on one rank becomes an error on every rank."""

import contextlib

import torch.distributed as dist


@contextlib.contextmanager
def together():
    """Run the block on every rank; a ValueError on any becomes one on all, and what else is raised on one rank a
    RuntimeError on the others. Also a barrier."""
    problem = None
    try:
        yield
    except Exception as error:  # none may leave the others waiting
        problem = error
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, problem and (isinstance(problem, ValueError), f"{problem}"))
    problems = [(rank, *each) for rank, each in enumerate(found) if each]
    unexpected = [f"rank {rank}: {text}" for rank, is_expected, text in problems if not is_expected]
    if problem is not None and not isinstance(problem, ValueError):
        raise problem
    if unexpected:
        raise RuntimeError(unexpected[0]) from problem
    if problems:
        raise ValueError(problems[0][2]) from problem
