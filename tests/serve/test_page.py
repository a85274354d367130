"""The page, in a real browser: what people do with it, how it looks, and what a screen reader finds."""
import itertools
import json
import os
import threading
from pathlib import Path

import pytest
from browser import browser
from PIL import Image
from serving import SAMPLES, nano, served, wait

from minivl import GenerationConfig, load_image
from minivl.serve import wire

pytestmark = pytest.mark.slow
IDLE = "!running && !$('send').disabled"
LAST = "[...document.querySelectorAll('.words')].at(-1).textContent"


@pytest.fixture(scope="module")
def pipe():
    return nano()


@pytest.fixture(scope="module")
def server(pipe):
    with served(pipe) as server:
        yield server


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.fixture
def page(tab, server, monkeypatch):
    """The page as it comes, of a model that always answers the same."""
    monkeypatch.setitem(wire.DEFAULTS, "temperature", 0)
    tab.look(900, 760)
    tab.open(f"http://127.0.0.1:{server.port}/")
    tab.wait("$('model').textContent == 'nano'")
    tab.errors.clear()
    yield tab
    assert not tab.errors


def ready(page, pictures):
    """Wait until so many pictures are in the form."""
    page.wait(f"$('form').querySelectorAll('.remove').length == {pictures}")


def ask(page, words, turns):
    """Ask, and wait until the conversation has so many messages. -> the answer."""
    page.js("text.focus()")
    page.type(words)
    page.key("Enter")
    page.wait(f"{IDLE} && messages.length == {turns}")
    return page.js(LAST)


def test_a_picture_is_dropped_and_asked_about(page, pipe):
    """Words stream; a second question knows the first; what is HTML in a text stays text."""
    greedy = GenerationConfig(max_new_tokens=60)
    page.drop(SAMPLES + "wide.png")
    ready(page, 1)
    page.js("""window.steps = new Set(); new MutationObserver(
        () => steps.add(document.querySelector('article:last-child .words').textContent)).observe(
        $('talk'), {subtree: true, childList: true, characterData: true}); 0""")
    session = pipe.chat(("describe this image", load_image(SAMPLES + "wide.png")), gen_config=greedy)
    assert ask(page, "describe this image", 2) == session.response.text
    steps = sorted(page.js("[...steps]"), key=len)
    assert len(steps) > 5 and all(longer.startswith(shorter) for shorter, longer in itertools.pairwise(steps[-5:]))
    rate = page.js("document.querySelector('.below span').textContent")
    first, written = session.response.input_token_len, session.response.generate_token_len
    assert rate.startswith(f"{first} tokens read, {written} written, ") and " a second; the first after " in rate
    question = "<b>Where</b> is the <img src=x onerror=alert(1)> heart?"
    assert ask(page, question, 4) == pipe.chat(question, session, greedy).response.text
    assert page.js("document.querySelectorAll('article b, article img').length") == 1       # the picture
    assert page.js("document.querySelectorAll('article')[2].innerText") == f"You\n{question}"
    assert page.js("$('said').textContent") == page.js(LAST)


@pytest.mark.parametrize("name", ["shapes.png", "wide.png", "tall.png", "small-print-tall.png"])
def test_the_tiles_drawn_are_those_the_model_gets(page, pipe, name):
    picture = load_image(SAMPLES + name)
    page.drop(SAMPLES + name)
    ready(page, 1)
    tiles = len(pipe.turn(("x", picture)).tiles)
    width, height, drawn, caption = page.js("""(() => { const box = document.querySelector('.tiles'); return [
        getComputedStyle(box).gridTemplateColumns.split(' ').length, getComputedStyle(box).gridTemplateRows.split(
        ' ').length, box.children.length, document.querySelector('figcaption').textContent] })()""")
    assert drawn == width * height == max(1, tiles - 1)
    assert caption.startswith(f"{picture.width} × {picture.height} pixels\n")
    assert caption.endswith(f": {tiles * pipe.model.config.num_image_token} visual tokens")
    seen, drawn = page.js("""['.seen img', '.tiles'].map(where => {
        const r = document.querySelector(where).getBoundingClientRect(); return [r.x, r.y, r.width, r.height] })""")
    assert seen == pytest.approx(drawn, abs=1) and seen[2] / seen[3] == pytest.approx(
        picture.width / picture.height, rel=0.03)


def test_a_picture_is_shown_as_the_model_sees_it(page, tmp_path):
    """Not as the camera was held."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (224, 112), "red").save(tmp_path / "held.jpg", exif=exif)
    page.drop(tmp_path / "held.jpg")
    ready(page, 1)
    assert page.js("document.querySelector('figcaption').textContent").startswith("224 × 112 pixels\n2 × 1 tiles")


def test_chosen_pasted_removed(page):
    root = page("DOM.getDocument")["root"]["nodeId"]
    node = page("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
    page("DOM.setFileInputFiles", nodeId=node, files=[os.path.abspath(SAMPLES + n) for n in ("after.png", "wide.png")])
    ready(page, 2)
    page.js("""new Promise(done => { const canvas = document.createElement('canvas'); canvas.toBlob(blob => {
        const data = new DataTransfer(); data.items.add(new File([blob], 'pasted.png', {type: 'image/png'}));
        text.dispatchEvent(new ClipboardEvent('paste', {clipboardData: data, bubbles: true, cancelable: true}));
        done() }) })""")
    ready(page, 3)
    assert page.js("[...document.images].map(image => image.alt)") == ["after.png", "wide.png", "pasted.png"]
    page.js("document.querySelectorAll('.remove')[1].click()")
    assert page.js("[...document.images].map(image => image.alt)") == ["after.png", "pasted.png"]


def test_stop_and_go_on(page, server, monkeypatch):
    """What was written stays, the server stops too, and the next question builds on it."""
    monkeypatch.setitem(wire.DEFAULTS, "ignore_eos", True)
    page.type("hello")
    page.key("Enter")
    page.wait(f"running && messages.length == 0 && document.querySelector('.words') && {LAST}.length > 20")
    assert page.js("[$('send').hidden, $('stop').hidden]") == [True, False]
    page.key("Escape")
    page.wait(f"{IDLE} && messages.length == 2")
    wait(lambda: server.service.asked == 0)
    monkeypatch.undo()
    partial = page.js(LAST)
    assert page.js("messages[1].content") == partial and page.js("$('problem').textContent") == ""
    assert ask(page, "who are you?", 4) and page.js("messages[1].content") == partial


def test_stopped_before_the_first_word(page, monkeypatch):
    """Then the question is in the form again, with its picture."""
    go = threading.Event()
    read = wire.read
    monkeypatch.setattr(wire, "read", lambda *args: go.wait(10) and read(*args))
    page.drop(SAMPLES + "wide.png")
    ready(page, 1)
    page.js("text.focus()")
    page.type("what?")
    page.key("Enter")
    page.wait("running && !document.querySelector('form figure')")
    page.js("$('stop').focus(); $('stop').click()")
    page.wait(IDLE)
    go.set()
    assert page.js("[text.value, messages.length, document.querySelectorAll('article').length]") == ["what?", 0, 0]
    assert page.js("document.activeElement.id") == "send"
    ready(page, 1)
    page.js("$('send').click()")
    page.wait(f"{IDLE} && messages.length == 2")


def test_what_goes_wrong_is_said(page, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    page.drop(tmp_path / "broken.png")
    page.wait("$('problem').textContent.includes('broken.png is no picture')")
    assert page.js("document.images.length") == 0
    page.js("text.focus()")
    page.type("word " * 9000)
    page.key("Enter")
    page.wait(f"{IDLE} && $('problem').textContent.includes('tokens')")
    assert page.js("text.value.length") > 40_000 and page.js("messages.length") == 0
    page.js("text.value = ''")
    page.errors.clear()         # the status 400 is one for the browser
    assert ask(page, "hello", 2) and page.js("$('problem').textContent") == ""


def test_a_key(tab, pipe):
    with served(pipe, api_keys=("sesame",)) as server:
        tab.open(f"http://127.0.0.1:{server.port}/")
        tab.wait("!$('keys').hidden && $('problem').textContent.includes('API key')")
        tab.js("$('key').focus()")
        tab.type("sesame")
        tab.key("Tab")
        tab.wait("$('model').textContent == 'nano' && !$('problem').textContent")
        assert ask(tab, "hello", 2)


def test_keys_and_copy(page, server):
    """Everything without a mouse."""
    page("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"],
         origin=f"http://127.0.0.1:{server.port}")
    assert page.js("document.activeElement.id") == "text"
    page.type("hello")
    page.key("Enter", modifiers=8)
    assert page.js("[text.value, running]") == ["hello\n", None]
    page.key("Enter")
    page.wait(f"{IDLE} && messages.length == 2")
    order = []
    for _ in range(4):
        page.key("Tab")
        order.append(page.js("document.activeElement.id || document.activeElement.textContent"))
    assert order[:2] == ["choose", "send"]
    page.js("document.querySelector('.below button').focus()")
    page.key("Enter")
    page.wait("document.querySelector('.below button').textContent == 'Copied'")
    assert page.js("navigator.clipboard.readText()") == page.js(LAST)


# ---- how it looks ---------------------------------------------------------------------------------------------------

CONTRAST = """(() => {
  const light = colour => { const [r, g, b] = colour.match(/[\\d.]+/g).map(x => x / 255).map(
    x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b };
  const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (!c.startsWith('rgba')) return c } };
  const bad = [];
  for (const e of document.querySelectorAll('h1, h2, p, span, .words, figcaption, button, textarea, label')) {
    const [a, b] = [getComputedStyle(e).color, behind(e)].map(light);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (!(ratio >= 4.5)) bad.push([e.outerHTML.slice(0, 80), ratio]);
  }
  return bad })()"""


@pytest.mark.parametrize(("width", "dark"), [(900, False), (900, True), (360, False), (360, True)])
def test_looks_and_access(page, width, dark, tmp_path):
    """Nothing is cut off, all can be read, and whatever can be used has a name."""
    page.look(width, 700, dark)
    page.drop(SAMPLES + "wide.png", SAMPLES + "tall.png")
    ready(page, 2)
    ask(page, "describe this image", 2)
    page.drop(SAMPLES + "shapes.png")
    ready(page, 1)
    (tmp_path / "page.png").write_bytes(page.picture())
    with Image.open(tmp_path / "page.png") as shot:
        assert shot.size == (width, 700) and (sum(shot.convert("RGB").getpixel((2, 2))) < 384) == dark
    assert page.js("document.documentElement.scrollWidth") == width
    assert page.js("""[...document.querySelectorAll('button, textarea')].filter(e => e.offsetParent).map(e => [
        e.id, e.getBoundingClientRect()]).filter(([, r]) => r.width < 24 || r.height < 24 || r.right > innerWidth)
        """) == []
    assert page.js(CONTRAST) == []
    nodes = [node for node in page("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
    names = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes]
    used = [both for both in names if both[0] in ("button", "textbox", "image", "main", "form")]
    assert all(name for _, name in used), used
    assert {("button", "Remove shapes.png"), ("button", "Send"), ("textbox", "Your question"), ("main", "Conversation"),
            ("image", "wide.png"), ("heading", "minivl"), ("heading", "You"), ("heading", "nano")} <= {*names}
    assert {"alert", "status"} <= {role for role, _ in names}
    if os.environ.get("AXE"):       # node_modules/axe-core/axe.min.js, of npm install axe-core
        page.js(Path(os.environ["AXE"]).read_text("utf-8") + ";0")
        found = page.js("axe.run().then(result => [result.passes.length, result.violations])")
        assert found[0] > 15 and found[1] == [], json.dumps(found[1], indent=1)


def test_nothing_comes_from_elsewhere(page, server):
    ask(page, "hello", 2)
    urls = page.js("performance.getEntriesByType('resource').map(entry => entry.name)")
    assert urls and all(url.startswith(f"http://127.0.0.1:{server.port}/") for url in urls)
