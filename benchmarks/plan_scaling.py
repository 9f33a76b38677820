"""Make the tables of docs/operate/scaling.md: the best counts for 8, 64 and 512 devices at max_staleness 0, 1 and 2.

Usage: python benchmarks/plan_scaling.py RATES.yaml [--devices 8 64 512] [--max-staleness 0 1 2] [--settings A.B=C ...]

Every call of the command is printed before its rows. groups_per_step grows with the devices, as in GROUPS.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"
GROUPS = {8: 64, 64: 256, 512: 1024}


def rows(devices: int, tree: dict[str, Any]) -> list[str]:
    """Markdown rows, one a staleness."""
    found = []
    for each in tree["plans"]:
        best = each["best"][0]
        counts = " : ".join(str(count) for count in best["counts"].values())
        busy = " / ".join(f"{share:.0%}" for share in best["busy"].values())
        waits = {role: max(on, key=on.__getitem__) for role, on in best["idle"].items() if on}
        shown = [role for role in ("generator", "learner") if role in waits]
        longest_waits = "; ".join(f"{role} {best['idle'][role][waits[role]]:.0%} on {waits[role]}" for role in shown)
        found.append(
            f"| {devices} | {each['max_staleness']} | {counts} | {best['step_seconds']:.1f}"
            f" | {best['tokens_per_second']:,.0f} | {busy} | {longest_waits} |"
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("rates", type=Path)
    parser.add_argument("--devices", type=int, nargs="*", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--max-staleness", nargs="*", default=["0", "1", "2"])
    parser.add_argument("--settings", nargs="*", default=[])
    options = parser.parse_args()
    bounds = [part for bound in options.max_staleness for part in ("--max-staleness", bound)]
    for devices in options.devices:
        own = [f"buffer.groups_per_step={GROUPS[devices]}", *options.settings]
        arguments = [str(CONFIG), *own, "--rates", str(options.rates), "--gpus", str(devices), *bounds]
        print("keel plan", *arguments, flush=True)
        command = [sys.executable, "-m", "keel", "plan", *arguments, "--json"]
        tree = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(*rows(devices, tree), sep="\n", flush=True)


if __name__ == "__main__":
    main()
