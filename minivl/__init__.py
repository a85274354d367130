"""minivl: InternVL2.5 and its AWQ releases in plain PyTorch, to read, change and check.

One letter per dimension, everywhere:

    B  prompts in the batch                         T  tokens of this call (queries)
    N  tiles of all pictures, thumbnails included   S  tokens seen so far (keys, values); in vision: tile side, pixels
    P  patches of a tile, without CLS (1024)        D  language width (2048)
    C  vision width (1024)                          H  query heads (16)   K  kv heads (2)   G = H / K  (8)
    L  visual tokens per tile (256)                 E  head dim (128; vision 64)
    V  vocabulary (151674)                          F  FFN width (11008)
    I, O, g  AWQ in features, out features, group size (128)

(numbers: InternVL2_5-4B). Reading order of the source: tiling, vit, pixel_unshuffle, projector, prompt, tokenizer,
qwen2, awq, model, generate; then checkpoint, media, pipeline, trace.
"""
import warnings

# torch without numpy says so once at import; nothing here needs numpy.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

from minivl import awq, prompt, tiling  # noqa: E402
from minivl.checkpoint import load  # noqa: E402
from minivl.generate import GenerationConfig, generate  # noqa: E402
from minivl.limits import InputError, Limits  # noqa: E402
from minivl.media import load_image, load_video  # noqa: E402
from minivl.model import MiniVL  # noqa: E402
from minivl.pipeline import (IMAGE_TOKEN, EngineConfig, Picture, Pipeline, Response, Session, pipeline,  # noqa: E402
                             video_prompt)
from minivl.tokenizer import Tokenizer  # noqa: E402
from minivl.trace import trace  # noqa: E402
