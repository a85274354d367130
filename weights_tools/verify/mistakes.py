"""Planted mistakes: each a change of one line in minivl, which `verify` must catch, and at the right stage.

    python -m weights_tools.verify.mistakes CHECKPOINT PICTURE ...      one line per mistake: where it was caught
    python -m weights_tools.verify.mistakes --nano                      the shipped model and its committed traces

Each runs in a process of its own, on a copy of the package with the one line changed. The reference is recorded first, or
read from --traces.
"""
from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path


PACKAGE = Path(__file__).resolve().parents[2] / "minivl"


@dataclass(frozen=True)
class Mistake:
    """`old` stands once in `file` and becomes `new`. `stage` is the first that must differ."""
    name: str
    file: str
    old: str
    new: str
    stage: str
    shown: str = "float32"      # by which run:
    # "bfloat16": float32 cannot show it; every stage is run on the reference's own input, where it must be equal
    # "quiet": float32, with the tower's embeddings 256 times smaller (see `quiet`): LayerNorm's eps matters only beside them


def _mistakes():
    def mistake(stage, file, name, old, new, shown="float32"):
        return Mistake(name, file, old, new, stage, shown)
    return (
        mistake("pixel_values", "tiling.py", "thumbnail first", "tiles.append(image", "tiles.insert(0, image"),
        mistake("pixel_values", "tiling.py", "tiles column by column",
                "for y in range(0, tile_size * rows, tile_size) for x in range(0, tile_size * columns, tile_size)]",
                "for x in range(0, tile_size * columns, tile_size) for y in range(0, tile_size * rows, tile_size)]"),
        mistake("pixel_values", "tiling.py", "mean of another model (CLIP)", "MEAN = (0.485, 0.456, 0.406)",
                "MEAN = (0.481, 0.458, 0.408)"),
        mistake("pixel_values", "tiling.py", "spread of another model (CLIP)", "STD = (0.229, 0.224, 0.225)",
                "STD = (0.269, 0.261, 0.276)"),
        mistake("pixel_values", "tiling.py", "bilinear resize",
                "stretched = image.resize((tile_size * columns, tile_size * rows), Image.Resampling.BICUBIC)",
                "stretched = image.resize((tile_size * columns, tile_size * rows), Image.Resampling.BILINEAR)"),
        mistake("pixel_values", "tiling.py", "height and width exchanged", "pixels.permute(0, 3, 1, 2)", "pixels.permute(0, 3, 2, 1)"),
        mistake("pixel_values", "tiling.py", "grid of columns and rows exchanged", "abs(aspect - columns / rows)", "abs(aspect - rows / columns)"),
        mistake("tiles", "tiling.py", "no thumbnail", "if use_thumbnail and len(tiles) > 1:", "if False:"),
        mistake("prompt", "prompt.py", "system message missing", "_split(SYSTEM if system is None else system, plain)",
                '_split(system or "", plain)'),
        mistake("prompt", "prompt.py", "no newline after the role", '(False, role + "\\n"), *body(parts)]', "(False, role), *body(parts)]"),
        mistake("stop tokens", "checkpoint.py", "stop token wrong", "tuple(sorted(eos))", "(max(eos) + 1,)"),
        mistake("vit.embeddings", "vit.py", "no position embedding", "return x + position", "return x"),
        mistake("vit.embeddings", "vit.py", "CLS last", "torch.cat([self.class_embedding.expand(len(x), -1, -1), x], dim=1)",
                "torch.cat([x, self.class_embedding.expand(len(x), -1, -1)], dim=1)"),
        mistake("vit.layers.0", "vit.py", "q, k, v in another order", "q, k, v = self.qkv(x).chunk", "q, v, k = self.qkv(x).chunk"),
        mistake("vit.layers.0", "vit.py", "tanh GELU", "F.gelu(self.fc1(x))", 'F.gelu(self.fc1(x), approximate="tanh")'),
        mistake("vit.layers.0", "vit.py", "LayerNorm eps 1e-5 for 1e-6", "self.norm1 = norm(config.hidden_size, config.layer_norm_eps)",
                "self.norm1 = norm(config.hidden_size, 1e-5)", "quiet"),
        mistake("vit.layers.0", "vit.py", "LayerScale missing", "x = x + self.ls1 * self.attn", "x = x + self.attn"),
        mistake("pixel_unshuffle", "model.py", "CLS not removed, the last patch is", "x[:, 1:]", "x[:, :-1]"),
        mistake("pixel_unshuffle", "pixel_unshuffle.py", "channel order (c, dy, dx)", "x.permute(0, 1, 3, 2, 4, 5)",
                "x.permute(0, 1, 3, 5, 2, 4)"),
        mistake("pixel_unshuffle", "pixel_unshuffle.py", "ps_version v1, transposed", "x.permute(0, 1, 3, 2, 4, 5)",
                "x.permute(0, 3, 1, 2, 4, 5)"),
        mistake("projector", "projector.py", "tanh GELU in the projector", "nn.GELU()", 'nn.GELU("tanh")'),
        mistake("inputs_embeds", "model.py", "tiles merged in reverse", "visual_tokens.to(x.dtype)", "visual_tokens.flip(0).to(x.dtype)"),
        mistake("llm.layers.0", "qwen2.py", "RoPE interleaved", "torch.cat([-second, first], dim=-1) * sin",
                "torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2) * sin"),
        mistake("llm.layers.0", "qwen2.py", "RoPE theta", "/ theta ** (pair / head_dim)", "/ (2 * theta) ** (pair / head_dim)"),
        mistake("llm.layers.0", "qwen2.py", "RoPE frequencies rounded to float16", "/ theta ** (pair / head_dim)",
                "* (theta ** -(pair / head_dim)).half().float()"),
        mistake("llm.layers.0", "qwen2.py", "positions off by one after the picture",
                "position = torch.arange(start, start + T, device=inputs_embeds.device)[None]",
                "position = torch.arange(start, start + T)[None]; position = position + (position > start + T // 2)"),
        mistake("llm.layers.0", "qwen2.py", "kv heads dealt round-robin",
                "q, k, v, attn_mask=mask", "q, *(t.repeat(1, q.shape[1] // t.shape[1], 1, 1) for t in (k, v)), attn_mask=mask"),
        mistake("llm.layers.0", "qwen2.py", "causal mask one too wide", "attn_mask=mask, is_causal=causal",
                "attn_mask=torch.ones(q.shape[2], k.shape[2]).tril(k.shape[2] - q.shape[2] + 1).bool()"),
        mistake("llm.layers.0", "qwen2.py", "RMSNorm takes the mean off", "x32 = x.float()", "x32 = x.float() - x.float().mean(-1, keepdim=True)"),
        mistake("llm.layers.0", "qwen2.py", "gate and up exchanged", "F.silu(gate) * up", "F.silu(up) * gate"),
        mistake("llm.layers.0", "awq.py", "no bias on q, k, v", "F.linear(x, W.T, bias)", "F.linear(x, W.T)"),
        mistake("llm.layers.0", "awq.py", "nibbles in natural order", "PACK_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)",
                "PACK_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)"),
        mistake("llm.layers.0", "awq.py", "+1 on the zero points, as GPTQ", "W -= unpack(qzeros)[:, None]", "W -= unpack(qzeros)[:, None] + 1"),
        mistake("llm.layers.0", "awq.py", "group index off by one", "W *= scales[:, None]", "W *= scales.roll(1, 0)[:, None]"),
        mistake("llm.layers.0", "awq.py", "no mask after the shift", "(packed >> 4 * nibble) & 0xF", "packed >> 4 * nibble"),
        mistake("vit.layers.0", "vit.py", "softmax in half precision, tower", "return F.scaled_dot_product_attention(q, k, v)",
                "e = (q @ k.mT * q.shape[-1] ** -0.5).exp(); return e / e.sum(-1, keepdim=True) @ v", "bfloat16"),
        mistake("llm.layers.0", "qwen2.py", "softmax in half precision, decoder", "return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, "
                "is_causal=causal, enable_gqa=True)",
                "k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v)); e = ((q @ k.mT) * q.shape[-1] ** -0.5).exp().tril("
                "k.shape[2] - q.shape[2]); return e / e.sum(-1, keepdim=True) @ v", "bfloat16"),
        mistake("llm.layers.0", "qwen2.py", "RMSNorm: weight before the cast", "return self.weight * (x32 * torch.rsqrt("
                "x32.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)", "return (self.weight.float() * (x32 * torch.rsqrt("
                "x32.pow(2).mean(-1, keepdim=True) + self.eps))).to(x.dtype)", "bfloat16"),
        mistake("llm.layers.0", "qwen2.py", "RMSNorm: mean and root in half precision", "x32 = x.float()", "x32 = x", "bfloat16"),
        mistake("llm.layers.0", "awq.py", "int4 scale rounded to bfloat16 first", "W *= scales[:, None]", "W *= scales[:, None].to(dtype)",
                "bfloat16"),
        mistake("greedy_scores", "qwen2.py", "cached steps start at position 0", "cache.length if cache is not None else 0", "0"),
    )


MISTAKES = _mistakes()


def quiet(checkpoint, folder) -> Path:
    """A copy of a checkpoint whose tower embeds 256 times smaller. A power of two: the copy is the same on every machine."""
    from minivl.checkpoint import find, open_weights
    from weights_tools.files import save_checkpoint
    checkpoint = find(checkpoint)
    tensors = {name: stored.read() for name, stored in open_weights(checkpoint).items()}
    for name in tensors:
        if name.startswith("vision_model.embeddings."):
            tensors[name] = tensors[name] / 256
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors*", "*.bin*"))
    save_checkpoint(tensors, folder)
    return Path(folder)


def plant(mistake: Mistake, folder) -> Path:
    """A copy of the package with the mistake in it; the folder to put on the path."""
    source = (PACKAGE / mistake.file).read_text("utf-8")
    if source.count(mistake.old) != 1:
        raise ValueError(f"{mistake.name}: {mistake.old!r} stands {source.count(mistake.old)} times in {mistake.file}, not once; the "
                         "source has changed, mend weights_tools/verify/mistakes.py")
    shutil.copytree(PACKAGE, Path(folder) / "minivl", ignore=shutil.ignore_patterns("nano", "__pycache__"))
    (Path(folder) / "minivl" / mistake.file).write_text(source.replace(mistake.old, mistake.new), "utf-8")
    return Path(folder)


def caught(mistake: Mistake | None, checkpoint, trace, pictures, dtype: str) -> dict:
    """{"stage": first that differs or None, "note"} for one mistake, found in a process of its own.

    A fork of this process, which has not imported minivl: so torch is imported once for all of them.
    """
    if "minivl" in sys.modules:
        raise RuntimeError("minivl is imported already, the copy with the mistake would not be; run this module by itself")
    receive, send = os.pipe()
    if child := os.fork():
        os.close(send)
        with os.fdopen(receive, encoding="utf-8") as file:
            answer = file.read()
        status = os.waitpid(child, 0)[1]
        return json.loads(answer) if answer else {"stage": f"died ({status})", "note": "the process ended without an answer"}
    try:
        with tempfile.TemporaryDirectory() as folder:
            if mistake:
                sys.path.insert(0, str(plant(mistake, folder)))
            from weights_tools.verify import compare
            if mistake and Path(sys.modules["minivl"].__file__).parent.parent != Path(folder):
                raise RuntimeError("the copy was not imported")
            report = compare.compare(checkpoint, compare.Recording.open(trace), pictures=pictures, dtype=dtype,
                                     local=dtype != "float32")
            row = report.first
            result = {"stage": row.stage if row else None, "note": row.note if row else "",
                      "error": row.error if row else None}
    except Exception as error:      # the mistake broke something before the comparison
        result = {"stage": f"{type(error).__name__}", "note": str(error)}
    with os.fdopen(send, "w", encoding="utf-8") as file:
        json.dump(result, file)
    os._exit(0)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m weights_tools.verify.mistakes", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT")
    parser.add_argument("pictures", nargs="*", metavar="PICTURE")
    parser.add_argument("--nano", action="store_true", help="the shipped int4 model, its sample picture and the committed traces")
    parser.add_argument("--traces", metavar="FOLDER", help="with float32.safetensors and, if there, bfloat16 and quiet, recorded before; "
                        "without a reference environment only these can be used")
    parser.add_argument("--record", metavar="FOLDER", help="keep the three traces there")
    parser.add_argument("--json", metavar="FILE", help="the results for programs")
    parser.add_argument("--page", metavar="FILE", help="the results as a table in Markdown")
    args = parser.parse_args(argv)
    if args.nano:       # by path: the copies of the package leave the models out
        args.checkpoint, args.pictures = str(PACKAGE / "nano" / "awq"), [str(PACKAGE / "nano" / "samples" / "small-print.png")]
        args.traces = str(Path(__file__).with_name("nano") / "awq")
    if not args.checkpoint or not args.pictures:
        parser.error("give a checkpoint and a picture, or --nano")
    import PIL.Image  # noqa: F401  once for all forks
    import safetensors  # noqa: F401
    import tokenizers  # noqa: F401
    import torch  # noqa: F401
    with tempfile.TemporaryDirectory() as scratch:
        runs = prepare(args, Path(scratch))
        if not runs:
            parser.error(f"{args.traces} holds no traces, nothing would be compared; record them with --record, or for --nano with "
                         "python -m weights_tools.verify --record-nano")
        rows, missed = tried(runs, args.pictures)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if args.page:
        Path(args.page).write_text(page(rows), encoding="utf-8")
    print(f"{len(rows) - len(runs)} mistakes, {missed} not caught where they are")
    return 1 if missed else 0


PAGE = """\
# Planted mistakes

Each is a change of one line in a copy of minivl, compared with what transformers computes by `python -m weights_tools.verify.mistakes`.
*found at*: the first stage that differs, which names the place to look. *error*: relative error of that stage; inputs and tokens
have none.

- **float32**: the exact comparison, tolerance 2e-5.
- **bfloat16**: what float32 cannot show. The order of roundings and the float32 islands (softmax, RMSNorm, the int4 scales) make
  no difference where nothing is rounded. Every stage is run on the reference's own input, where it must be equal.
- **quiet**: float32, on a copy of the checkpoint with embeddings 256 times smaller. LayerNorm's eps is 1e-6 beside the variance
  of its input: too little to see, unless that variance is small.

| shown by | mistake | file | the line becomes | found at | error | what verify says |
|---|---|---|---|---|---|---|
"""


def page(rows: list) -> str:
    """The rows of a run as Markdown."""
    def code(text):
        return "`" + text.replace("|", "\\|") + "`"
    became = {mistake.name: mistake.new for mistake in MISTAKES}
    lines = [f"| {row['shown']} | {row['mistake']} | {row['file'] and code(row['file'])} | "
             f"{code(became[row['mistake']]) if row['file'] else ''} | {row['stage'] or 'nothing differs'} | "
             f"{format(row['error'], '.1e') if row.get('error') else ''} | {row['note'].replace('|', chr(92) + '|')} |" for row in rows]
    return PAGE + "\n".join(lines) + "\n"


def prepare(args, scratch: Path) -> dict:
    """{"float32": (checkpoint, trace, dtype), ...}: what each run compares. In processes of their own, which import minivl."""
    folder = Path(args.traces or args.record or scratch)
    runs = {shown: (args.checkpoint, folder / f"{shown}.safetensors", "bfloat16" if shown == "bfloat16" else "float32")
            for shown in ("float32", "bfloat16", "quiet") if not args.traces or (folder / f"{shown}.safetensors").exists()}
    if "quiet" in runs:
        copy = scratch / "quiet"
        subprocess.run([sys.executable, "-c", "import sys; from weights_tools.verify.mistakes import quiet; quiet(*sys.argv[1:])",
                        args.checkpoint, copy], check=True)
        runs["quiet"] = (copy, *runs["quiet"][1:])
    for checkpoint, trace, dtype in runs.values() if not args.traces else ():
        subprocess.run([sys.executable, "-m", "weights_tools.verify", checkpoint, *args.pictures, "--dtype", dtype, "--record", trace], check=True)
    return runs


def tried(runs: dict, pictures: list) -> tuple:
    """(rows, how many were not caught where they are), printed one by one."""
    planted = [(None, shown) for shown in runs] + [(m, m.shown) for m in MISTAKES if m.shown in runs]
    rows, missed = [], 0
    for mistake, shown in planted:
        checkpoint, trace, dtype = runs[shown]
        found = caught(mistake, checkpoint, trace, pictures, dtype)
        wanted = mistake.stage if mistake else None
        missed += found["stage"] != wanted
        rows.append({"shown": shown, "mistake": mistake.name if mistake else "none", "file": mistake.file if mistake else "", "wanted": wanted, **found})
        print(f"{'ok   ' if found['stage'] == wanted else 'WRONG'} {rows[-1]['file']:<20} {rows[-1]['mistake']:<42} {str(found['stage']):<16}"
              f" {found.get('error') or 0:8.1e}  {found['note']}", flush=True)
    return rows, missed


if __name__ == "__main__":
    sys.exit(main())        # not through weights_tools.run, which imports minivl
