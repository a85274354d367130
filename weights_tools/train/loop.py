"""The loop around the steps: it can be stopped at any time, and ends with the same weights as if it had not been.

    FOLDER/state.pt         all that a stopped stage needs to go on: weights, optimisers, number of the step
    FOLDER/choices.json     the recipe, and what was decided once for all stages
    FOLDER/log.jsonl        one line each time the training is watched
"""
from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from minivl.config import read_json
from minivl.limits import InputError, is_there, reading
from weights_tools.files import clear, save_torch, told, write_text


@dataclass
class Loop:
    """A training in a folder, in stages numbered from 1. Making one reads what a stopped training left there.

    Raises InputError where the folder holds a training of another `recipe` (a sha256 of all that decides the weights).
    """
    folder: Path
    recipe: str
    device: str = "cpu"
    save_every: int = 250           # steps from one state file to the next
    watch_every: int = 250          # steps from one line of the log to the next
    quiet: bool = False             # lines of the log go into its file only
    writes: bool = True             # False: another process of the same training writes all files
    stop_at: int | None = None      # leave after so many steps of this call (for tests and for lent machines)

    def __post_init__(self):
        self.folder = Path(self.folder)
        if self.writes:
            self._clear()
        self.state_file = self.folder / "state.pt"
        self.choices_file = self.folder / "choices.json"
        self.done = 0
        self.state = self._read_state()
        self.kept = read_json(self.choices_file) if is_there(self.choices_file) else {}
        for found in (self.state, self.kept):
            if found and found.get("recipe") != self.recipe:
                raise InputError(f"{self.folder} holds a training of another recipe ({str(found.get('recipe'))[:12]}, "
                                 f"this one is {self.recipe[:12]}); choose another folder")

    def keep(self, name: str, value: Callable):
        """Return what this training chose under a name, or else `value()`, which then holds to its end, for all stages.

        For what a machine decides, and another one, or the same one on a busy day, might decide otherwise. The value is
        what JSON can hold: a number, a string, True. (Trainings begun before choices.json have it in their state.)
        """
        if name not in self.kept:
            self.kept[name] = self.state[name] if name in self.state else value()
            self.kept["recipe"] = self.recipe
            if self.writes:
                write_text(self.choices_file, json.dumps(self.kept, indent=1, sort_keys=True) + "\n")
        return self.kept[name]

    def run(self, stage: int, name: str, steps: int, *, batches: Callable[[int], Iterable], step: Callable,
            watch: Callable[[], dict], parts: dict, optimisers: list) -> bool:
        """Run a stage to its end, or go on with it; False where `stop_at` came first.

        batches(first): the batches from this number on. step(number, batch) -> (loss, tokens). watch() -> what the log
        shall say. `parts`: {name: module, or anything with state_dict and load_state_dict}, all that a step changes; of
        a model that is mostly frozen give only what learns. A step must draw nothing at random, or from its number.
        """
        first = self._resume(stage, parts, optimisers)
        start = time.perf_counter()
        tokens = 0
        mean = None
        with tqdm(total=steps, initial=first, desc=name, unit="step",
                  disable=None if self.writes else True) as bar:
            for number, batch in enumerate(batches(first), start=first):
                loss, n = step(number, batch)
                mean = loss if mean is None else 0.98 * mean + 0.02 * loss
                tokens += n
                self.done += 1
                bar.update()
                bar.set_postfix_str(f"loss {mean:.3f}, {tokens / (time.perf_counter() - start):.0f} tokens/s")
                last = number + 1 == steps
                stopped = self.done == self.stop_at and not last
                if (number + 1) % self.watch_every == 0 or last:
                    seen = {key: float(f"{value:.6g}") for key, value in watch().items()}
                    self._log({"stage": name, "step": number + 1, "loss": round(mean, 4), **seen},
                              time.perf_counter() - start)
                if stopped or not last and (number + 1) % self.save_every == 0:
                    self._save(stage, number + 1, parts, optimisers)
                if stopped:
                    return False
        return True

    def finish(self):
        """Forget the state: call it when what a stage has made lies in files of its own, and after the last stage."""
        if self.writes:
            with told(self.state_file, "what the stage has made is whole"):
                self.state_file.unlink(missing_ok=True)
        self.state = {}

    def _clear(self):
        with told(self.folder, "nothing is trained"):
            self.folder.mkdir(parents=True, exist_ok=True)
            clear(self.folder)
            for stage in [path for path in self.folder.iterdir() if path.is_dir()]:
                clear(stage)        # which may be whole and not be written again

    def _read_state(self) -> dict:
        if not is_there(self.state_file):
            return {}
        try:
            with reading(self.state_file), open(self.state_file, "rb") as file:
                return dict(torch.load(file, weights_only=True, map_location=self.device))
        except InputError:
            raise
        except Exception:       # pickle, zip and runtime errors
            raise InputError(f"{self.state_file} is not a whole state of a training; delete it to begin its stage "
                             "again") from None

    def _resume(self, stage, parts, optimisers) -> int:
        """Put a stopped stage's state into its parts; the number of the next step."""
        if self.state.get("stage") != stage:
            return 0
        for name, part in parts.items():
            part.load_state_dict(self.state[name])
        for optimiser, saved in zip(optimisers, self.state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        return self.state["step"]

    def _save(self, stage, step, parts, optimisers):
        state = {"recipe": self.recipe, "stage": stage, "step": step,
                 **{name: part.state_dict() for name, part in parts.items()},
                 "optimisers": [optimiser.state_dict() for optimiser in optimisers]}
        if self.writes:
            save_torch(state, self.state_file)

    def _log(self, line, seconds):
        if not self.writes:
            return
        path = self.folder / "log.jsonl"
        with told(path, "run again, it goes on from the last state"), open(path, "ab+") as log:
            log.seek(0)
            log.truncate(log.read().rfind(b"\n") + 1)       # half a line of a killed run
            log.write((json.dumps({**line, "seconds": round(seconds)}) + "\n").encode("utf-8"))
        if not self.quiet:
            tqdm.write(" ".join(f"{key} {value}" for key, value in line.items()))
