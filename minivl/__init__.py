"""minivl: InternVL2.5 and its AWQ releases in plain PyTorch, to read, change and check.

One letter per dimension, everywhere:

    B  prompts in the batch                         T  tokens of this call (queries)
    N  tiles of all pictures, thumbnails included   S  tokens seen so far (keys and values)
    R  tile side in pixels (448)                    D  language width (2048)
    P  patches of a tile, without CLS (1024)        H  query heads (16)   K  kv heads (2)   G = H / K  (8)
    C  vision width (1024)                          E  head dim (128; vision 64)
    L  visual tokens per tile (256)                 F  FFN width (11008)
    V  vocabulary (151674)                          I, O, g  AWQ in features, out features, group size (128)

(numbers: InternVL2_5-4B). README.md beside this file gives the reading order of the source.
"""
import warnings

__version__ = "0.2.0"

# torch without numpy says so once at import; nothing here needs numpy.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

from minivl import awq, prompt, tiling  # noqa: E402
from minivl.chat.answers import Response  # noqa: E402
from minivl.chat.pipeline import EngineConfig, Pipeline, Session, pipeline  # noqa: E402
from minivl.chat.requests import IMAGE_TOKEN, Picture, video_prompt  # noqa: E402
from minivl.files.load import load  # noqa: E402
from minivl.generation import generate  # noqa: E402
from minivl.limits import InputError, Limits  # noqa: E402
from minivl.media import load_image, load_video  # noqa: E402
from minivl.model import MiniVL  # noqa: E402
from minivl.sampling import GenerationConfig  # noqa: E402
from minivl.tokenizer import Tokenizer  # noqa: E402
from minivl.tracing import first_mismatch, relative_error, trace  # noqa: E402
