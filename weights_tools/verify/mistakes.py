"""Planted mistakes: each a change of one line in minivl, which `verify` must catch, and at the right stage.

    python -m weights_tools.verify.mistakes CHECKPOINT PICTURE ...      one line per mistake: where it was caught
    python -m weights_tools.verify.mistakes --nano                      the shipped model and its committed traces
    python -m weights_tools.verify.mistakes --nano --precision exact    decoder, tower and int4 on a prepared model

Each runs in a process of its own, on a copy of the package with the one line changed. The reference is recorded first,
or read from --traces.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "minivl"
RUNS = ("float32", "bfloat16", "quiet", "long")
# What `minivl.fast` has versions of its own for: an edit in these files must count there too.
PREPARED = ("vit.py", "qwen2.py", "internlm2.py", "awq.py")
QWEN2, INTERNLM2 = "Qwen2ForCausalLM", "InternLM2ForCausalLM"


@dataclass(frozen=True)
class Mistake:
    """`old` stands once in `file` and becomes `new`. `stage` is the first that must differ."""
    stage: str
    file: str
    name: str
    old: str
    new: str
    shown: str = "float32"      # by which run:
    # "bfloat16": float32 cannot show it; every stage is run on the reference's own input, where it must be equal
    # "quiet": float32, with the tower's embeddings 256 times smaller (see `quiet`): LayerNorm's eps matters only there
    # "long": float32, with an InternLM2 decoder said to be trained for 16 tokens: RoPE is another beyond them
    decoder: str = ""           # the only one that can show it; "": any, but for the files of one decoder


MISTAKES = (
    Mistake("pixel_values", "tiling.py", "thumbnail first",
            "tiles.append(image", "tiles.insert(0, image"),
    Mistake("pixel_values", "tiling.py", "tiles column by column",
            "for y in range(0, tile_size * rows, tile_size) for x in range(0, tile_size * columns, tile_size)]",
            "for x in range(0, tile_size * columns, tile_size) for y in range(0, tile_size * rows, tile_size)]"),
    Mistake("pixel_values", "tiling.py", "mean of another model (CLIP)",
            "MEAN = (0.485, 0.456, 0.406)", "MEAN = (0.481, 0.458, 0.408)"),
    Mistake("pixel_values", "tiling.py", "spread of another model (CLIP)",
            "STD = (0.229, 0.224, 0.225)", "STD = (0.269, 0.261, 0.276)"),
    Mistake("pixel_values", "tiling.py", "bilinear resize",
            "stretched = image.resize((tile_size * columns, tile_size * rows), Image.Resampling.BICUBIC)",
            "stretched = image.resize((tile_size * columns, tile_size * rows), Image.Resampling.BILINEAR)"),
    Mistake("pixel_values", "tiling.py", "height and width exchanged",
            "pixels.permute(0, 3, 1, 2)", "pixels.permute(0, 3, 2, 1)"),
    Mistake("pixel_values", "tiling.py", "grid of columns and rows exchanged",
            "abs(aspect - columns / rows)", "abs(aspect - rows / columns)"),
    Mistake("tiles", "tiling.py", "no thumbnail",
            "if use_thumbnail and len(tiles) > 1:", "if False:"),
    Mistake("prompt", "prompt.py", "system message missing",
            "_split(SYSTEM if system is None else system, plain=True)", '_split(system or "", plain=True)'),
    Mistake("prompt", "prompt.py", "no newline after the role",
            '(False, role + "\\n"), *body(parts)]', "(False, role), *body(parts)]"),
    Mistake("stop tokens", "files/load.py", "stop token wrong",
            "tuple(sorted(eos))", "(max(eos) + 1,)"),
    Mistake("vit.embeddings", "vit.py", "no position embedding",
            "return x + position", "return x"),
    Mistake("vit.embeddings", "vit.py", "CLS last",
            "torch.cat([self.class_embedding.expand(len(x), -1, -1), x], dim=1)",
            "torch.cat([x, self.class_embedding.expand(len(x), -1, -1)], dim=1)"),
    Mistake("vit.layers.0", "vit.py", "q, k, v in another order",
            "q, k, v = self.qkv(x).chunk", "q, v, k = self.qkv(x).chunk"),
    Mistake("vit.layers.0", "vit.py", "tanh GELU",
            "F.gelu(self.fc1(x))", 'F.gelu(self.fc1(x), approximate="tanh")'),
    Mistake("vit.layers.0", "vit.py", "LayerNorm eps 1e-5 for 1e-6",
            "self.norm1 = norm(config.hidden_size, config.layer_norm_eps)",
            "self.norm1 = norm(config.hidden_size, 1e-5)", "quiet"),
    Mistake("vit.layers.0", "vit.py", "LayerScale missing",
            "x = x + self.ls1 * self.attn", "x = x + self.attn"),
    Mistake("pixel_unshuffle", "model.py", "CLS not removed, the last patch is",
            "x[:, 1:]", "x[:, :-1]"),
    Mistake("pixel_unshuffle", "pixel_unshuffle.py", "channel order (c, dy, dx)",
            "x.permute(0, 1, 3, 2, 4, 5)", "x.permute(0, 1, 3, 5, 2, 4)"),
    Mistake("pixel_unshuffle", "pixel_unshuffle.py", "ps_version v1, transposed",
            "x.permute(0, 1, 3, 2, 4, 5)", "x.permute(0, 3, 1, 2, 4, 5)"),
    Mistake("projector", "projector.py", "tanh GELU in the projector",
            "nn.GELU()", 'nn.GELU("tanh")'),
    Mistake("inputs_embeds", "model.py", "tiles merged in reverse",
            "visual_tokens.to(x.dtype)", "visual_tokens.flip(0).to(x.dtype)"),
    Mistake("llm.layers.0", "qwen2.py", "RoPE interleaved",
            "torch.cat([-second, first], dim=-1) * sin",
            "torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2) * sin"),
    Mistake("llm.layers.0", "qwen2.py", "RoPE theta",
            "/ theta ** (pair / head_dim)", "/ (2 * theta) ** (pair / head_dim)"),
    Mistake("llm.layers.0", "qwen2.py", "RoPE frequencies rounded to float16",
            "/ theta ** (pair / head_dim)", "* (theta ** -(pair / head_dim)).half().float()"),
    Mistake("llm.layers.0", "qwen2.py", "positions off by one after the picture",
            "position = torch.arange(start, start + T, device=inputs_embeds.device)[None]",
            "position = torch.arange(start, start + T)[None]; position = position + (position > start + T // 2)"),
    Mistake("llm.layers.0", "qwen2.py", "kv heads dealt round-robin",
            "q, k, v, attn_mask=mask",
            "q, *(t.repeat(1, q.shape[1] // t.shape[1], 1, 1) for t in (k, v)), attn_mask=mask"),
    Mistake("llm.layers.0", "qwen2.py", "causal mask one too wide",
            "attn_mask=mask, is_causal=causal",
            "attn_mask=torch.ones(q.shape[2], k.shape[2]).tril(k.shape[2] - q.shape[2] + 1).bool()"),
    Mistake("llm.layers.0", "qwen2.py", "RMSNorm takes the mean off",
            "x32 = x.float()", "x32 = x.float() - x.float().mean(-1, keepdim=True)"),
    Mistake("llm.layers.0", "qwen2.py", "gate and up exchanged",
            "F.silu(gate) * up", "F.silu(up) * gate"),
    Mistake("llm.layers.0", "awq.py", "no bias on q, k, v",
            "F.linear(x, W.T, bias)", "F.linear(x, W.T)", decoder=QWEN2),
    Mistake("llm.layers.0", "awq.py", "nibbles in natural order",
            "PACK_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)", "PACK_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)"),
    Mistake("llm.layers.0", "awq.py", "+1 on the zero points, as GPTQ",
            "W -= unpack(qzeros)[:, None]", "W -= unpack(qzeros)[:, None] + 1"),
    Mistake("llm.layers.0", "awq.py", "group index off by one",
            "W *= scales[:, None]", "W *= scales.roll(1, 0)[:, None]"),
    Mistake("llm.layers.0", "awq.py", "no mask after the shift",
            "(packed >> 4 * nibble) & 0xF", "packed >> 4 * nibble"),
    Mistake("vit.layers.0", "vit.py", "softmax in half precision, tower",
            "return F.scaled_dot_product_attention(q, k, v)",
            "e = (q @ k.mT * q.shape[-1] ** -0.5).exp(); return e / e.sum(-1, keepdim=True) @ v", "bfloat16"),
    Mistake("llm.layers.0", "qwen2.py", "softmax in half precision, decoder",
            "return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)",
            "k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v)); e = ((q @ k.mT) * "
            "q.shape[-1] ** -0.5).exp().tril(k.shape[2] - q.shape[2]); return e / e.sum(-1, keepdim=True) @ v",
            "bfloat16"),
    Mistake("llm.layers.0", "qwen2.py", "RMSNorm: weight before the cast",
            "return self.weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)",
            "return (self.weight.float() * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + "
            "self.eps))).to(x.dtype)", "bfloat16"),
    Mistake("llm.layers.0", "qwen2.py", "RMSNorm: mean and root in half precision",
            "x32 = x.float()", "x32 = x", "bfloat16"),
    Mistake("llm.layers.0", "awq.py", "int4 scale rounded to bfloat16 first",
            "W *= scales[:, None]", "W *= scales[:, None].to(dtype)", "bfloat16"),
    Mistake("greedy_scores", "qwen2.py", "cached steps start at position 0",
            "cache.length if cache is not None else 0", "0"),
    Mistake("input_ids", "tokenizer.py", "InternLM2: <s> twice",
            "return list(self.recipe.begin)", "return 2 * list(self.recipe.begin)", decoder=INTERNLM2),
    Mistake("llm.layers.0", "internlm2.py", "wqkv: all of q before all of k and v",
            "unflatten(-1, (self.kv_heads, -1, self.head_dim))",
            "unflatten(-1, (-1, self.kv_heads, self.head_dim)).transpose(2, 3)"),
    Mistake("llm.layers.0", "internlm2.py", "wqkv: key and value exchanged",
            "k, v = x[..., -2, :], x[..., -1, :]", "k, v = x[..., -1, :], x[..., -2, :]"),
    Mistake("llm.layers.0", "internlm2.py", "w1 and w3 exchanged",
            "return self.w1(x), self.w3(x)", "return self.w3(x), self.w1(x)"),
    Mistake("llm.layers.0", "internlm2.py", "InternLM2: RoPE theta",
            "base = theta *", "base = 2 * theta *"),
    Mistake("llm.layers.0", "internlm2.py", "InternLM2: kv heads dealt round-robin",
            "q, k, v, attn_mask=mask",
            "q, *(t.repeat(1, q.shape[1] // t.shape[1], 1, 1) for t in (k, v)), attn_mask=mask"),
    Mistake("llm.layers.0", "internlm2.py", "no dynamic NTK beyond the trained length",
            "(factor * length / trained - factor + 1).clamp(min=1)", "torch.ones_like(length)", "long"),
    Mistake("llm.layers.0", "internlm2.py", "dynamic NTK: exponent 1 instead of E / (E - 2)",
            "stretch ** (head_dim / (head_dim - 2))", "stretch", "long"),
    Mistake("greedy_scores", "internlm2.py", "InternLM2: cached steps start at position 0",
            "cache.length if cache is not None else 0", "0"),
)


def decoder_of(checkpoint: str | Path) -> str:
    """Read which decoder a checkpoint in a folder has; any other is taken to be Qwen2's."""
    path = Path(checkpoint) / "config.json"
    return json.loads(path.read_text("utf-8-sig"))["llm_config"]["architectures"][0] if path.is_file() else QWEN2


def can_show(mistake: Mistake, decoder: str) -> bool:
    """Say whether a checkpoint with this decoder runs the line that the mistake is in."""
    only = {"qwen2.py": QWEN2, "internlm2.py": INTERNLM2}.get(mistake.file, mistake.decoder)
    return only in ("", decoder)


@dataclass(frozen=True)
class Run:
    """What a copy of the package is run on."""
    checkpoint: str | Path
    trace: Path
    pictures: list
    dtype: str
    precision: str | None = None        # of minivl.load; with one, a model of any size counts as large


def quiet(checkpoint: str | Path, folder: str | Path) -> Path:
    """Copy a checkpoint with embeddings 256 times smaller. A power of two: the copy is the same on every machine."""
    from minivl.files.find import find
    from minivl.files.formats import open_weights
    from weights_tools.files import save_checkpoint
    checkpoint = find(checkpoint)
    tensors = {name: stored.read() for name, stored in open_weights(checkpoint).items()}
    for name in tensors:
        if name.startswith("vision_model.embeddings."):
            tensors[name] = tensors[name] / 256
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors*", "*.bin*"))
    save_checkpoint(tensors, folder)
    return Path(folder)


def long(checkpoint: str | Path, folder: str | Path) -> Path:
    """Copy a checkpoint as if it was trained for 16 tokens: any prompt is longer."""
    shutil.copytree(checkpoint, folder)
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text("utf-8-sig"))
    config["llm_config"]["max_position_embeddings"] = 16
    path.write_text(json.dumps(config), "utf-8")
    return Path(folder)


def plant(mistake: Mistake, folder: str | Path) -> Path:
    """Copy the package with the mistake in it; the folder to put on the path."""
    source = (PACKAGE / mistake.file).read_text("utf-8")
    if source.count(mistake.old) != 1:
        raise ValueError(f"{mistake.name}: {mistake.old!r} stands {source.count(mistake.old)} times in {mistake.file}, "
                         "not once; the source has changed, mend weights_tools/verify/mistakes.py")
    shutil.copytree(PACKAGE, Path(folder) / "minivl", ignore=shutil.ignore_patterns("nano", "__pycache__"))
    (Path(folder) / "minivl" / mistake.file).write_text(source.replace(mistake.old, mistake.new), "utf-8")
    return Path(folder)


def compared(run: Run):
    """Compare the imported package with the run's trace: a compare.Report.

    "exact" adds in another order than the modules as released: 1e-6 per stage, which the tolerance of float32 allows.
    """
    import minivl
    from weights_tools.verify import compare
    from weights_tools.verify.recording import Recording
    model = None
    if run.precision:
        from minivl import fast
        fast.LARGE = 0
        model = minivl.load(run.checkpoint, dtype=run.dtype, precision=run.precision)
    return compare.compare(run.checkpoint, Recording.open(run.trace), pictures=run.pictures, dtype=run.dtype,
                           model=model, local=run.dtype != "float32")


def caught(mistake: Mistake | None, run: Run) -> dict:
    """Find {"stage": first that differs or None, "note", "error"} for one mistake, in a process of its own.

    A fork of this process, which has not imported minivl: so torch is imported once for all of them.
    """
    if "minivl" in sys.modules:
        raise RuntimeError("minivl is imported already, the copy with the mistake would not be; run this module by "
                           "itself")
    receive, send = os.pipe()
    if child := os.fork():
        os.close(send)
        with os.fdopen(receive, encoding="utf-8") as file:
            answer = file.read()
        status = os.waitpid(child, 0)[1]
        return json.loads(answer) if answer else {"stage": f"died ({status})",
                                                  "note": "the process ended without an answer"}
    try:
        with tempfile.TemporaryDirectory() as folder:
            if mistake:
                sys.path.insert(0, str(plant(mistake, folder)))
            import minivl
            if mistake and Path(minivl.__file__).parent.parent != Path(folder):
                raise RuntimeError("the copy was not imported")
            row = compared(run).first
            result = {"stage": row.stage if row else None, "note": row.note if row else "",
                      "error": row.error if row else None}
    except Exception as error:      # the mistake broke something before the comparison
        result = {"stage": f"{type(error).__name__}", "note": str(error)}
    with os.fdopen(send, "w", encoding="utf-8") as file:
        json.dump(result, file)
    os._exit(0)


def planted(shown: Iterable[str], precision: str | None = None, decoder: str = QWEN2) -> list:
    """List what is tried: [(mistake, or None for the package as it is, run that must show it), ...].

    With a precision only the mistakes in files that it has faster versions of; always only those of the decoder.
    """
    chosen = [m for m in MISTAKES if m.shown in shown and can_show(m, decoder)
              and (precision is None or m.file in PREPARED)]
    return [(None, name) for name in shown] + [(mistake, mistake.shown) for mistake in chosen]


def prepare(args: argparse.Namespace, scratch: Path) -> dict:
    """Make the runs, {"float32": Run, ...}: copies and traces come from processes of their own, which import minivl."""
    folder = Path(args.traces or args.record or scratch)
    shown = [name for name in RUNS if not args.traces or (folder / f"{name}.safetensors").exists()]
    if args.precision:      # in half precision every model stays as released
        shown = [name for name in shown if name != "bfloat16"]
    if decoder_of(args.checkpoint) != INTERNLM2:        # Qwen2's RoPE has one base, however long the prompt
        shown = [name for name in shown if name != "long"]
    runs = {}
    for name in shown:
        checkpoint = args.checkpoint
        if name in ("quiet", "long"):
            checkpoint = scratch / name
            code = f"import sys; from weights_tools.verify.mistakes import {name}; {name}(*sys.argv[1:])"
            subprocess.run([sys.executable, "-c", code, args.checkpoint, checkpoint], check=True)
        runs[name] = Run(checkpoint, folder / f"{name}.safetensors", args.pictures,
                         "bfloat16" if name == "bfloat16" else "float32", args.precision)
    for run in runs.values() if not args.traces else ():
        subprocess.run([sys.executable, "-m", "weights_tools.verify", run.checkpoint, *args.pictures, "--dtype",
                        run.dtype, "--record", run.trace], check=True)
    return runs


def warm_compiler():
    """Let torch import its compiler, and find out what the processor's vectors can do, once for all forks.

    It does so before it loads a loop that is compiled already: 2.5 s of processor time, half of it ten processes. Where
    it fails there is no compiler, and no fork compiles.
    """
    import torch._inductor.package
    import torch.utils.cpp_extension  # noqa: F401
    from torch._inductor.cpu_vec_isa import pick_vec_isa
    with contextlib.suppress(Exception):
        pick_vec_isa()


def tried(runs: dict, precision: str | None, decoder: str) -> tuple:
    """Try every mistake and print a line for each: (rows, how many were not caught where they are)."""
    rows = []
    missed = 0
    for mistake, shown in planted(runs, precision, decoder):
        found = caught(mistake, runs[shown])
        wanted = mistake.stage if mistake else None
        right = found["stage"] == wanted
        missed += not right
        row = {"shown": shown, "mistake": mistake.name if mistake else "none", "file": mistake.file if mistake else "",
               "wanted": wanted, **found}
        rows.append(row)
        print(f"{'ok   ' if right else 'WRONG'} {row['file']:<20} {row['mistake']:<42} {str(row['stage']):<16}"
              f" {row.get('error') or 0:8.1e}  {row['note']}", flush=True)
    return rows, missed


# ---- the page -------------------------------------------------------------------------------------------------------

PAGE = """\
# Planted mistakes

Each is a change of one line in a copy of minivl, compared with what transformers computes by
`python -m weights_tools.verify.mistakes`. *found at*: the first stage that differs, which names the place to look.
*error*: relative error of that stage; inputs and tokens have none.

- **float32**: the exact comparison, tolerance 2e-5.
- **bfloat16**: what float32 cannot show. The order of roundings and the float32 islands (softmax, RMSNorm, the int4
  scales) make no difference where nothing is rounded. Every stage is run on the reference's own input, where it must be
  equal.
- **quiet**: float32, on a copy of the checkpoint with embeddings 256 times smaller. LayerNorm's eps is 1e-6 beside the
  variance of its input: too little to see, unless that variance is small.

| shown by | mistake | file | the line becomes | found at | error | what verify says |
|---|---|---|---|---|---|---|
"""


def page(rows: list) -> str:
    """Write the rows of a run as Markdown."""
    def escaped(text):
        return text.replace("|", "\\|")

    def code(text):
        return f"`{escaped(text)}`" if text else ""
    became = {mistake.name: mistake.new for mistake in MISTAKES}
    lines = []
    for row in rows:
        error = format(row["error"], ".1e") if row.get("error") else ""
        cells = (row["shown"], row["mistake"], code(row["file"]), code(became.get(row["mistake"])),
                 row["stage"] or "nothing differs", error, escaped(row["note"]))
        lines.append(f"| {' | '.join(cells)} |")
    return PAGE + "\n".join(lines) + "\n"


# ---- the command ----------------------------------------------------------------------------------------------------

def options(argv: list | None) -> tuple:
    """Read the command line: (the options, the parser, for its errors)."""
    parser = argparse.ArgumentParser(prog="python -m weights_tools.verify.mistakes", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", nargs="?", metavar="CHECKPOINT")
    add("pictures", nargs="*", metavar="PICTURE")
    add("--nano", action="store_true", help="the shipped int4 model, its sample picture and the committed traces")
    add("--precision", choices=["exact"],
        help="plant only in the decoder, the tower and int4, and load with this precision, the model prepared by "
             "minivl.fast however small it is: an edit must count there too")
    add("--traces", metavar="FOLDER", help="with float32.safetensors and, if there, bfloat16 and quiet, recorded "
        "before; without a reference environment only these can be used")
    add("--record", metavar="FOLDER", help="keep the traces there")
    add("--json", metavar="FILE", help="the results for programs")
    add("--page", metavar="FILE", help="the results as a table in Markdown")
    args = parser.parse_args(argv)
    # As minivl.options.refuse, which cannot be imported here.
    for mode, others in (("nano", ("checkpoint", "pictures", "traces", "record")), ("traces", ("record",))):
        idle = [name if name in ("checkpoint", "pictures") else f"--{name}" for name in others if getattr(args, name)]
        if getattr(args, mode) and idle:
            parser.error(f"{', '.join(idle)} would have no effect with --{mode}; leave it out")
    if args.nano:       # by path: the copies of the package leave the models out
        args.checkpoint = str(PACKAGE / "nano" / "awq")
        args.pictures = [str(PACKAGE / "nano" / "samples" / "small-print.png")]
        args.traces = str(Path(__file__).with_name("nano") / "awq")
    if not args.checkpoint or not args.pictures:
        parser.error("give a checkpoint and a picture, or --nano")
    return args, parser


def main(argv: list | None = None) -> int:
    """Run the command; its exit code."""
    args, parser = options(argv)
    import PIL.Image  # noqa: F401  once for all forks
    import safetensors  # noqa: F401
    import tokenizers  # noqa: F401
    import torch  # noqa: F401
    if args.precision:
        warm_compiler()
    with tempfile.TemporaryDirectory() as scratch:
        runs = prepare(args, Path(scratch))
        if not runs:
            parser.error(f"{args.traces} holds no traces, nothing would be compared; record them with --record, or for "
                         "--nano with python -m weights_tools.verify --record-nano")
        rows, missed = tried(runs, args.precision, decoder_of(args.checkpoint))
    # Late, for it imports minivl, of which every fork has a copy of its own.
    from weights_tools.files import write_text
    try:
        if args.json:
            write_text(args.json, json.dumps(rows, indent=1) + "\n")
        if args.page:
            write_text(args.page, page(rows))
    except OSError as error:
        parser.error(str(error))
    print(f"{len(rows) - len(runs)} mistakes, {missed} not caught where they are")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())        # not through weights_tools.run, which imports minivl
