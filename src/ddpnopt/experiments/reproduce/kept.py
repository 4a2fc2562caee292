# SPDX-License-Identifier: MIT
"""Measurements that are no trainings: made once, kept in the store, read from it afterwards."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from ddpnopt.experiments.fingerprint import code_hash
from ddpnopt.experiments.reproduce.outcome import Request


def kept(
    request: Request,
    kind: str,
    setting: Mapping[str, Any],
    module: str,
    make: Callable[[], dict[str, Any]],
) -> dict[str, Any] | None:
    """Return a measurement from the store, making it first where it lacks.

    Args:
        request: What the user asked for; without `run` nothing is made.
        kind: What is measured.
        setting: Everything that decides its outcome, as JSON takes it.
        module: Dotted name of the module that measures: other code, another measurement.
        make: Measures; its result is kept with the seconds it took (`seconds`).

    Returns:
        The measurement; None where there is none and none may be made.
    """
    text = json.dumps([code_hash(module), setting], sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    found = request.store.get_record(kind, key)
    if found is not None or not request.run:
        return found
    start = time.perf_counter()
    payload = make()
    payload["seconds"] = time.perf_counter() - start
    request.store.put_record(kind, key, payload)
    return payload
