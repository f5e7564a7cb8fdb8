"""Put a finished student into the package: its weights, its record, and what `mlff validate` found.

    python ship.py organics/organics.safetensors organics/report.json

The report is the JSON that `mlff validate --suite ... --report report.html` writes beside its page.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import mlff
from mlff.files import replacing
from mlff.painn import load_checkpoint, read_record

STUDENTS = Path(mlff.__file__).parent / "students"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("report", type=Path)
    args = parser.parse_args()
    load_checkpoint(args.checkpoint)  # raises for what is none
    record, report = read_record(args.checkpoint), json.loads(args.report.read_text())
    if "card" not in record:
        raise SystemExit(f"{args.checkpoint.with_suffix('.json')}: expected a card; add `card` to the student's configuration, see config.py")
    checks = {check["name"]: {key: check[key] for key in ("value", "unit", "limit", "passed")} for check in report["checks"]}
    record["validation"] = {name: {key: x for key, x in check.items() if x is not None} for name, check in checks.items()}
    target = STUDENTS / args.checkpoint.name
    shutil.copyfile(args.checkpoint, target)
    with replacing(target.with_suffix(".json")) as unfinished:
        unfinished.write_text(json.dumps(record, indent=2) + "\n")
    failed = [name for name, check in checks.items() if check["passed"] is False]
    print(f"{target}, {target.stat().st_size / 1e6:.1f} MB; checks that failed: {', '.join(failed) or 'none'}")


if __name__ == "__main__":
    main()
