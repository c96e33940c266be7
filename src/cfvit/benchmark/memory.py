"""How much memory a call takes while it runs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most bytes of tensors that a call holds at a time, on top of what lay there before.

    On a GPU by the counters of torch's allocator, which leave out the memory that CUDA graphs keep; on a CPU by what
    torch's profiler notes of each allocation, which leaves out what libraries take by themselves.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "100")  # else the profiler reports its start and missing GPUs
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    notes = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    return max(accumulate((event["args"]["Bytes"] for event in notes), initial=0))
