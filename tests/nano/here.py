"""Work that a command gives to other processes, done in this one."""
from concurrent.futures import Executor, Future


class Here(Executor):
    """Does the work at once, in this process: two others would import torch first."""

    def __init__(self, *args):
        pass

    def submit(self, work, /, *args, **kwargs):
        done = Future()
        done.set_result(work(*args, **kwargs))
        return done
