"""The bench of the service, for a moment."""
import re

import pytest
import serving  # noqa: F401  skips without the extra

from weights_tools.bench import serve


@pytest.mark.slow
def test_a_moment_of_load(capsys):
    assert serve.main(["--seconds", "0.4", "--clients", "1", "3", "--requests", "20"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^the pipeline in batches of 8: \d+\.\d tokens/s$", said, re.M)
    rows = re.findall(r"^ +([13])  +(\d+)  +([\d.]+)  +(\d+) +(\d+)  +([\d.]+) +([\d.]+)$", said, re.M)
    assert [row[0] for row in rows] == ["1", "3"]
    for _, answers, rate, *times in rows:
        assert int(answers) >= 1 and float(rate) > 1 and all(float(t) > 0 for t in times[:2])
        assert float(times[0]) <= float(times[1]) and float(times[2]) <= float(times[3])
    assert re.findall(r"^memory after (\d+) more requests: \d+ MB$", said, re.M) == ["2", "20"]
    assert re.search(r"^(\d+) answers; of \1 compared with the pipeline's, 0 differ$", said, re.M)
