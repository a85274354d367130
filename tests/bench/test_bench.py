"""The bench: what a model asks for, and a whole run on a tiny checkpoint. No test of speed."""
import struct

import pytest

from minivl import InputError
from minivl.config import Config
from weights_tools.bench import __main__ as command
from weights_tools.bench import machine, peers, workers
from weights_tools.synthesize import config_json


def test_what_the_4b_asks_for():
    work = machine.work_of(Config.from_json(config_json("4B", awq=True)))
    assert round(work["GFLOP/token"], 2) == 5.55        # 36 layers of 2 * 77.07 million multiply-adds
    assert 720 < work["GFLOP/tile"] < 735 and round(work["GB/token"], 2) == 2.01


def test_a_whole_run(tiny):
    report = workers.bench(tiny, ["lean"], rounds=1, tokens=2, jobs=("tile", "prefill 128", "decode 1", "decode 4"))
    entry = report["engines"]["lean"]
    assert all(entry[job]["best"] > 0 for job in ("tile", "prefill 128", "decode 1", "decode 4"))
    assert abs(sum(entry["profile"].values()) - 1) < 1e-6 and entry["memory"]["peak"] > 0.1
    table = command.table(report)
    assert "| decode 4, tok/s |" in table and "lean" in table and "peak memory" in table


@pytest.mark.slow
def test_accuracy(tiny, capsys):
    found = workers.accuracy(tiny, ["released", "lean", "op"])
    assert found["lean"] == {"logits": 0.0, "KL": pytest.approx(0, abs=1e-6),
                             "largest KL": pytest.approx(0, abs=1e-6), "same best": 1.0}
    assert 1e-4 < found["op"]["logits"] < 0.2 and 0 < found["op"]["KL"] <= found["op"]["largest KL"]
    with pytest.raises(InputError, match="give two or more"):
        command.main([str(tiny), "--accuracy", "--precision", "exact"])


@pytest.mark.parametrize("peer", command.PEERS)
def test_a_missing_peer_says_what_to_do(tiny, peer):
    with pytest.raises(InputError, match=f"{peer} ended with code 1; .* install the *extra `peers`"):
        workers.Worker(peer, tiny, workers.sys.executable, 1)
    with pytest.raises(SystemExit):
        command.main([str(tiny), "--against", "vllm"])


def test_random_blocks_carry_their_scale():
    data = peers.random_blocks(5, 18, 0, 0.5)
    assert len(data) == 90 and all(struct.unpack("<e", data[i:i + 2]) == (0.5,) for i in range(0, 90, 18))
