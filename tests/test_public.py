"""What `import minivl` offers, and that no name of it hides a module."""
import pkgutil
from types import ModuleType

import minivl

NAMES = ["EngineConfig", "GenerationConfig", "IMAGE_TOKEN", "InputError", "Limits", "MiniVL", "Picture", "Pipeline",
         "Response", "Session", "Tokenizer", "awq", "first_mismatch", "generate", "load", "load_image", "load_video",
         "pipeline", "prompt", "relative_error", "tiling", "trace", "video_prompt"]


def test_public_names():
    assert [name for name in NAMES if not hasattr(minivl, name)] == []


def test_no_function_hides_a_module():
    modules = {module.name for module in pkgutil.iter_modules(minivl.__path__)}
    hidden = {name for name in modules if not isinstance(getattr(minivl, name, minivl), ModuleType)}
    assert hidden == set()
