"""The page of verify: nothing on it is wider than the screen it is read on, nothing shrinks."""
import re

import torch

from minivl import show
from weights_tools.verify import compare, report

STAGES = [f"llm.layers.{i}.self_attn.a_long_name" for i in range(60)]
ROWS = [compare.Row(stage, [13, 1025, 1024], 1e-7, 1e-5, [0, 12, 999], 0.99, stage != STAGES[7], "look at " + "x" * 300)
        for stage in STAGES]
FULL = compare.Report(
    "folder/" * 30, "trace", {"reference": "transformers"}, "float32", 1e-6, "why", ROWS, ["a stage: " + "y" * 300],
    {"top5": [{"reference": (1, -0.5), "minivl": (2, -0.7)}], "kl": 0.1, "rank": 2},
    [{"reference": 1, "minivl": 2, "margin": 0.5}], {STAGES[7]: torch.rand(13, 16)})


def test_wide_things_scroll_by_themselves():
    page = report.html(FULL)
    assert '<meta name=\'viewport\' content=\'width=device-width' in page
    wide = len(re.findall("<(table|svg)", page))
    assert wide == 4 == len(re.findall(r'<div class="wide" tabindex="0"><(table|svg)', page))
    assert ".wide { overflow-x: auto; }" in report.STYLE
    assert "max-width: 100%" not in report.STYLE                # a curve made small is a curve without words
    assert re.search(r"\bp,[^{]*{ overflow-wrap: anywhere", report.STYLE)      # a path or a note has no spaces
    assert 'role="img" aria-label="relative error: error from' in page


def test_small_words_have_contrast():
    """4.5 to 1 on the white card, as WCAG 2 asks for words (section 1.4.3)."""
    for colour in (show.FAINT, show.INK):
        parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        assert 1.05 / (0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05) >= 4.5
