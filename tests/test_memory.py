"""A full device is one sentence with the numbers, wherever it fills up.

No GPU: its error and its numbers are made up.
"""
import pytest
import torch

import minivl
from minivl.memory import free_memory


@pytest.fixture
def full(monkeypatch):
    def fail(*args, **how):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\n"
                                     "GPU 0 has a total capacity of ...")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1.5e9, 80e9))
    return fail


def test_the_weights(tiny, full, monkeypatch):
    monkeypatch.setattr("minivl.files.load.read_tensors", full)
    says = (r"^no memory left on cpu for 0\.0 GB of weights: 1\.5 of its 80\.0 GB are free; take a smaller or an AWQ "
            r"model, or device='cpu'$")
    with pytest.raises(minivl.InputError, match=says):
        minivl.load(tiny)


def test_a_prompt_and_tiles(tiny, full):
    model = minivl.load(tiny)
    model.language_model.layers[1].forward = full
    says = "^no memory left on cpu for 2 prompts of 3 tokens: 1.5 of its 80.0 GB are free; ask for fewer at once"
    with pytest.raises(minivl.InputError, match=says):
        minivl.generate(model, [[1, 2, 3], [4, 5]], max_new_tokens=3)
    model.vision_model.encoder.layers[0].forward = full
    says = "^no memory left on cpu for 3 tiles at once: .* look at fewer together$"
    with pytest.raises(minivl.InputError, match=says):
        model.visual_tokens(torch.randn(3, 3, 56, 56))


# ---- what is left ---------------------------------------------------------------------------------------------------

GB = 10**9
MEMINFO = "MemTotal:       24000000 kB\nMemFree:         1000000 kB\nMemAvailable:   16000000 kB\n"


@pytest.fixture
def machine(tmp_path):
    """Writes files below a root, {path: text}."""
    def write(files):
        for path, text in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        return tmp_path
    return write


def version2(folder, limit, used, cache=0):
    return {f"sys/fs/cgroup{folder}/memory.max": f"{limit}\n", f"sys/fs/cgroup{folder}/memory.current": f"{used}\n",
            f"sys/fs/cgroup{folder}/memory.stat": f"anon 5\ninactive_file {cache}\nactive_file 7\n"}


def version1(folder, limit, used, cache=0):
    at = f"sys/fs/cgroup/memory{folder}"
    return {f"{at}/memory.limit_in_bytes": f"{limit}\n", f"{at}/memory.usage_in_bytes": f"{used}\n",
            f"{at}/memory.stat": f"inactive_file 3\ntotal_inactive_file {cache}\n"}


@pytest.mark.parametrize("groups, left", [
    ({}, 16_000_000 * 1024),
    ({"proc/self/cgroup": "0::/a/b\n", **version2("/a/b", "max", 5)}, 16_000_000 * 1024),
    ({"proc/self/cgroup": "0::/a/b\n", **version2("/a/b", 8 * GB, 5 * GB, GB)}, 4 * GB),
    # the limit of a group above
    ({"proc/self/cgroup": "0::/a/b\n", **version2("/a/b", "max", GB), **version2("/a", 6 * GB, 5 * GB)}, GB),
    # a container: the path is the host's
    ({"proc/self/cgroup": "0::/kubepods/pod7\n", **version2("", 2 * GB, GB)}, GB),
    ({"proc/self/cgroup": "0::/a\n", **version2("/a", GB, 2 * GB)}, 0),
    ({"proc/self/cgroup": "0::/a\n", **version2("/a", 20 * GB, 0)}, 16_000_000 * 1024),
    ({"proc/self/cgroup": "9:name=systemd:/\n4:memory:/x\n1:cpu,cpuacct:/y\n0::/\n",
      **version1("/x", 9 * GB, 4 * GB, 2 * GB)}, 7 * GB),
    ({"proc/self/cgroup": "4:memory:/x\n", **version1("", 3 * GB, GB), **version1("/x", 2**63 - 4096, 1)}, 2 * GB)])
def test_free_memory(machine, groups, left):
    assert free_memory(machine({"proc/meminfo": MEMINFO, **groups})) == left


def test_a_system_that_does_not_say_what_is_available(tmp_path, monkeypatch):
    monkeypatch.setattr("os.sysconf", {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}.get, raising=False)
    assert free_memory(tmp_path) == 4_096_000
    monkeypatch.delattr("os.sysconf")
    assert free_memory(tmp_path) is None


def test_this_machine():
    assert free_memory() is None or free_memory() > 10**6
