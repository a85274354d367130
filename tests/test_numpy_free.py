"""Nothing here needs numpy: everything is imported and the tiny model answers with numpy unimportable."""
import subprocess
import sys
from pathlib import Path

from conftest import GOLDEN

ROOT = Path(__file__).parents[1]

SCRIPT = """
import sys, warnings
sys.modules["numpy"] = None                         # `import numpy` now raises
import pkgutil, importlib, minivl, weights_tools
for package in (minivl, weights_tools):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:        # of the extra `serve`
            assert error.name in ("starlette", "uvicorn"), error
from weights_tools.synthesize import synthesize
pipe = minivl.pipeline(synthesize(sys.argv[1], "tiny", awq=True))
config = minivl.GenerationConfig(max_new_tokens=5, do_sample=True, random_seed=0, ignore_eos=True)
session = pipe.chat(("what?", sys.argv[2]), gen_config=config)
session = pipe.chat("why?", session, config)
assert len(session.response.token_ids) == 5
assert len(minivl.load_video(sys.argv[3], num_segments=2)) == 2
frames = [i for i in sys.modules if i == "numpy" and sys.modules[i] is not None or i.startswith("numpy.")]
assert not frames, frames
print("answered without numpy")
"""


def test_without_numpy(tmp_path):
    from PIL import Image
    images = [Image.new("RGB", (30, 30), (c, 0, 0)) for c in (0, 100, 200)]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:])
    run = subprocess.run([sys.executable, "-W", "error", "-W", "ignore:Failed to initialize NumPy", "-c", SCRIPT,
                          str(tmp_path / "tiny"), str(GOLDEN / "tiger.jpeg"), str(tmp_path / "a.gif")],
                         capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0 and run.stdout == "answered without numpy\n", run.stderr[-2000:]


def test_no_file_mentions_it():
    for folder in ("minivl", "weights_tools", "tests", "notebooks"):
        for path in (ROOT / folder).rglob("*.py"):
            lines = [line for line in path.read_text().splitlines() if line.strip().startswith(("import ", "from "))]
            assert not any("numpy" in line.split("#")[0].split() for line in lines), path
