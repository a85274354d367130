"""The same model, fast. `awq.py`, `qwen2.py` and `vit.py` say what is computed; this folder computes it in less time.

    prepare(model, "exact")     what the modules as released compute, up to the order of additions
    prepare(model, "fast")      may round to bfloat16 whatever this machine computes faster in it

    edits.py      a reader's changes count: a faster version gives way to a definition that is not the shipped one
    machine.py    what this machine has: a compiler, the faster of torch's products, memory
    loops.py      int4 as three loops over re-laid words, and a head in half precision
    compiled.py   these loops compiled ahead of time by torch (AOTInductor) and kept on disk
    layers.py     the faster modules; each is the definition's class with one method replaced
    graphs.py     on a GPU: a step of the decoder recorded once and replayed (CUDA graphs)
    threads.py    how many threads share a piece of work
    replace.py    which modules of a model become which of these

Some parts of torch used here are private: `torch._inductor` (compiled.py), `torch.ops.mkldnn` (machine.py, layers.py)
and `torch._weight_int4pack_mm` (layers.py). One thing changes for the whole process, and nothing puts it back: after a
large model is loaded on Linux, glibc keeps up to 256 MB of freed memory (`machine.keep_memory`).
"""
# Numbers in a model. Below this, measuring and compiling would take longer than they save. 0: every model is large.
LARGE = 10 ** 8

from minivl.fast.compiled import loop, warm  # noqa: E402
from minivl.fast.loops import SHIFTS, few_rows, relayout  # noqa: E402
from minivl.fast.machine import fastest, has_compiler, products  # noqa: E402
from minivl.fast.replace import keeps_half, prepare, relays  # noqa: E402

__all__ = ["LARGE", "SHIFTS", "fastest", "few_rows", "has_compiler", "keeps_half", "loop", "prepare", "products",
           "relayout", "relays", "warm"]
