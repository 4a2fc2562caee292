# SPDX-License-Identifier: MIT
"""joblib's Dask backend, made safe for sweeps: clear errors, and lost workers end no sweep."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from joblib import parallel_config, register_parallel_backend

from ddpnopt.experiments.records import RunResult

#: Seconds to wait for a Dask scheduler and its first worker.
TIMEOUT = 30
_NAME = "ddpnopt-dask"


class ClusterError(RuntimeError):
    """The Dask cluster can't be used; the message says what to do."""


def _reach(address: str) -> None:
    """Raise where nothing listens: Dask's own client tries for minutes."""
    if address.startswith("inproc://"):
        return
    try:
        host, port = import_module("distributed.comm").get_address_host_port(address)
        socket.create_connection((host, port), timeout=TIMEOUT).close()
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"no Dask scheduler answers at {address!r} ({error}); start one with `dask scheduler` "
            "and give the address that it prints"
        ) from error


def _backend() -> type[Any]:
    """Make joblib's backend tell of tasks that ended without a result.

    joblib's own waits forever for a task whose worker died too often.
    """
    base: Any = import_module("joblib._dask").DaskDistributedBackend
    killed: Any = import_module("distributed").KilledWorker

    # Its base exists only where Dask is installed, so no type checker can know it.
    class Backend(base):  # type: ignore[misc]
        def submit(self, func: Any, callback: Callable[[Any], None]) -> Any:
            ((_, (config,), _),) = func.items

            def settle(out: Any) -> None:
                if isinstance(out, killed):
                    out = [RunResult.crash(config, f"KilledWorker: {out}")]
                callback(out)

            return super().submit(func, settle)

        async def _collect(self) -> None:
            while self._continue:
                async for future, result in self.waiting_futures:
                    settled, callback = self._results.pop(future), self._callbacks.pop(future)
                    if future.status == "error":
                        result = result[1]
                    elif future.status != "finished":
                        result = ClusterError(f"a task was {future.status}: is the scheduler up?")
                    settled.set_result(None)
                    callback(result)
                await asyncio.sleep(0.01)

        def retrieve_result_callback(self, out: Any) -> Any:
            if isinstance(out, BaseException):
                raise out
            return super().retrieve_result_callback(out)

    return Backend


@contextmanager
def cluster(address: str, check: Callable[[], str]) -> Iterator[int]:
    """Send joblib's tasks to a Dask cluster while the block runs.

    Args:
        address: Of the scheduler.
        check: Names the version of the code; all workers must answer what this process does.

    Yields:
        The number of the cluster's cores.

    Raises:
        ClusterError: Dask is not installed, the scheduler does not answer, it has no workers, or
            they have other code.
    """
    try:
        distributed = import_module("distributed")
    except ModuleNotFoundError as error:
        raise ClusterError(
            f"--dask needs Dask (missing: {error.name}): pip install 'ddpnopt[dask]'"
        ) from error
    _reach(address)
    with distributed.Client(address, timeout=TIMEOUT, set_as_default=False) as client:
        try:
            client.wait_for_workers(1, timeout=TIMEOUT)
        except TimeoutError as error:
            raise ClusterError(
                f"the Dask scheduler at {address!r} has no worker after {TIMEOUT} s; "
                f"start some with `dask worker {address}`"
            ) from error
        expected = check()
        for worker, found in client.run(check, on_error="return").items():
            if found != expected:
                raise ClusterError(
                    f"the Dask worker {worker} can't take part: this process's code is "
                    f"{expected}, its answer was {found!r}; install the same ddpnopt and "
                    "libraries on all workers"
                )
        register_parallel_backend(_NAME, _backend())
        with parallel_config(backend=_NAME, client=client):
            yield sum(client.ncores().values())
