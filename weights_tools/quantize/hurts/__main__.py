"""Where does quantisation hurt? python -m weights_tools.quantize.hurts PARENT QUANTISED [QUANTISED ...]

    PARENT and each QUANTISED, one decoder layer at a time, on prompts that neither has been calibrated on
    -> error of weights and outputs of each linear, growth of the error from layer to layer, KL of the next token

Show it pictures with questions and answers (--pictures), a text (--text) or both; nano's world is at hand for nano.
Each QUANTISED is compared with the float checkpoint it was made from; smoothing, which moves factors between norms and
linears, counts as no error. The residual streams lie on disk meanwhile, in the folder that TMPDIR names.
"""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from minivl import options
from minivl.files.find import find
from minivl.limits import InputError
from weights_tools import run
from weights_tools.files import write_text
from weights_tools.nano.evaluate import HELD_OUT
from weights_tools.quantize.__main__ import add_shown, check_shown, shown
from weights_tools.quantize.hurts import report
from weights_tools.quantize.hurts.measure import measure


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line, and refuse what would have no effect."""
    parser = argparse.ArgumentParser(prog="python -m weights_tools.quantize.hurts", description=__doc__,
                                     formatter_class=options.Help)
    parser.add_argument("parent", metavar="PARENT", help="a float checkpoint: folder, hub id or short name")
    parser.add_argument("twins", metavar="QUANTISED", nargs="+", help="what was made of it, by whatever method")
    add_shown(parser)
    parser.add_argument("--json", metavar="FILE", help="everything that was measured, for programs")
    parser.add_argument("--html", metavar="FILE", help="the report as one page with pictures")
    args = parser.parse_args(argv)
    check_shown(args, options.given(parser, argv))
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    args = arguments(argv)
    for path in filter(None, (args.json, args.html)):
        if not Path(path).parent.is_dir():      # before the work, which may take hours
            raise InputError(f"there is no folder {Path(path).parent}; make it first")
    prompts, _ = shown(args, find(args.parent), HELD_OUT)
    if prompts is None:
        raise InputError("there is nothing to compare on; give --pictures FILE.jsonl, --text FILE.txt or both, others "
                         "than those of the calibration")
    found = measure(args.parent, args.twins, prompts)
    print(report.text(found))
    if args.json:
        write_text(args.json, json.dumps(found.json(), indent=1, allow_nan=False) + "\n")
    if args.html:
        write_text(args.html, report.html(found))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
