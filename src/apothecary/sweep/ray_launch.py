"""Trials on many machines through Ray (an extra): the store and the sweep's folder must be on a shared file system.

Ray queues the trials and restarts nothing: the sweep itself decides whether a trial that died is tried again.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from apothecary.errors import ConfigError
from apothecary.sweep.launch import POLL, Work, attempt
from apothecary.sweep.trial import Found, Task


class Ray:
    """Tasks of a Ray cluster: that of RAY_ADDRESS, else one on this machine."""

    def __init__(self, work: Work, gpus: float = 0.0) -> None:
        try:
            import ray  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ConfigError("sweep.launcher: ray needs Ray, which is not installed; "
                              "pip install 'apothecary[ray]', or choose launcher: local") from error  # fmt: skip
        self.ray: Any = ray
        if not ray.is_initialized():
            ray.init(log_to_driver=False)
        # max_calls: a process of its own for each trial, as Ray would otherwise keep one for many
        self.remote = ray.remote(max_retries=0, max_calls=1, num_gpus=gpus)(partial(attempt, work))
        self.running: dict[Any, Task] = {}

    def start(self, task: Task) -> None:
        task.folder.mkdir(parents=True, exist_ok=True)
        environment = {"env_vars": {"OMP_NUM_THREADS": str(task.threads), "TOKENIZERS_PARALLELISM": "false"}}
        self.running[self.remote.options(num_cpus=task.threads, runtime_env=environment).remote(task)] = task

    def wait(self) -> Iterator[tuple[Task, Found | None, str]]:
        ended, _ = self.ray.wait(list(self.running), timeout=POLL)
        for reference in ended:
            task = self.running.pop(reference)
            try:
                yield task, self.ray.get(reference), ""
            except Exception as error:  # Ray's own: the worker or its machine died
                yield task, None, f"its Ray worker died ({type(error).__name__})"

    def stop(self) -> None:
        for reference in self.running:
            self.ray.cancel(reference, force=True)
        self.running.clear()
