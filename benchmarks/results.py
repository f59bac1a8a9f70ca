"""What was measured, by machine and section: no machine's figure replaces another's, and no brief one a full one.

``docs/performance.json`` is ``{machine: {section: result}}``. A brief measurement of a section has a name of its own
and is shown where its machine has no full one.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

Result = dict[str, Any]
Results = dict[str, dict[str, Result]]

#: What a processor may have for products of bfloat16 matrices, as Linux calls it.
UNITS = ("avx512_bf16", "amx_bf16", "bf16", "svebf16")


def keep(results: Results, section: str, result: Result, is_brief: bool = False) -> None:
    """Put a result in the place of the last one of the same machine, section and kind, unless nobody worked."""
    if any(record["samples"] and not is_products(record) for record in result["contenders"]):
        results.setdefault(key(result["machine"]), {})[_name(section, is_brief)] = result


def is_products(record: dict[str, Any]) -> bool:
    """Whether a record is of the machine's peak, and of no contender's work."""
    return any("flops_per_second" in sample for sample in record["samples"])


def shown(results: Results, section: str) -> dict[str, Result]:
    """The result of each machine that measured a section: the full one, or else the brief one."""
    found = {
        machine: sections.get(section, sections.get(_name(section, is_brief=True)))
        for machine, sections in results.items()
    }
    return {machine: result for machine, result in found.items() if result}


def expected_minutes(results: Results, section: str, is_brief: bool) -> float | None:
    """How long a section took the last time, here or else on any other machine."""
    name = _name(section, is_brief)
    known = [results.get(key(machine()), {}), *results.values()]
    return next((sections[name]["minutes"] for sections in known if name in sections), None)


def _name(section: str, is_brief: bool) -> str:
    return f"brief {section}" if is_brief else section


def key(where: dict[str, Any]) -> str:
    """What a machine is called: its GPU, or else its processor and the units of it that multiply matrices.

    Family and model tell processors apart whose name hides their generation, as in a virtual machine.

    Example:
        >>> key({"gpu": None, "processor": "AMD EPYC", "family": "26", "model": "2", "bfloat16_units": ["avx512_bf16"]})
        'AMD EPYC (family 26, model 2), avx512_bf16'
    """
    generation = f" (family {where['family']}, model {where['model']})" if where.get("family") else ""
    return where["gpu"] or ", ".join([where["processor"] + generation, *where["bfloat16_units"]])


def machine() -> dict[str, Any]:
    """What this runs on, as far as it matters for speed."""
    import torch

    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    flags = fields.get("flags", fields.get("Features", "")).split()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": fields.get("model name", platform.processor() or platform.machine()),
        "family": fields.get("cpu family"),
        "model": fields.get("model"),
        "cores": os.cpu_count(),
        "bfloat16_units": [unit for unit in UNITS if unit in flags],
        "memory_gib": round(memory / 2**30),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
    }
