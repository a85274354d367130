"""The page of a run: all of it is there, strangers' texts stay texts, and its filters work in a real browser."""
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made import picture
from runs import SETTINGS, answer, eight, result

from minivl import InputError
from weights_tools.evaluate import page, report
from weights_tools.evaluate.benchmarks import Broken, Verdict

sys.path.append(str(Path(__file__).parents[1] / "serve"))       # as pytest does for the tests there

from browser import browser


class Seen(HTMLParser):
    """What a browser makes of a page: its elements, and its text without style and script."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.inside = []
        self.texts = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "input", "img"):
            self.inside.append(tag)

    def handle_endtag(self, tag):
        assert self.inside.pop() == tag     # what is opened is closed, in order

    def handle_data(self, data):
        if self.inside and self.inside[-1] not in ("style", "script"):
            self.texts.append(data)

    def named(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def written(folder, results, **settings):
    report.write(folder, results, {**SETTINGS, **settings})
    return (folder / "report.html").read_text("utf-8")


# ---- what is on it --------------------------------------------------------------------------------------------------

def test_all_of_a_question(tmp_path):
    def change(rows, answers):
        answers[0] = answer(rows[0], "B", said="I think.\nFinal answer: B", tiles=(6, 2), tokens=1234, seconds=2.25)
    text = " ".join(Seen(written(tmp_path, [result("AI2D", change=change)])).texts)
    for part in ("Which label marks part 0?", "A.", "1", "3.5", "all", "index  0".replace("  ", " "), "foodChains",
                 "I think.\nFinal answer: B", "Read in it", "by a rule", "1,234 tokens, tiles 6 + 2, 2.2 s",
                 "<image>\nWhich label marks part 0?", "AI2D asks several questions of one diagram", "75"):
        assert part in text, part


def test_verdicts_in_words():
    of = result("MMStar").rows[0]
    state = lambda right, **more: page.state(answer(of, "x", **more), Verdict(0, None, right, "rule"))
    assert [state(1.0), state(0.0), state(0.5), state(None), state(0.0, refused="no")] == [
        "right", "wrong", "partly right", "cannot be told", "not asked"]


def test_the_truth_is_marked(tmp_path):
    seen = Seen(written(tmp_path, [result("MMMU"), result("MathVista"), result("MMVet")]))
    options = [attributes for attributes in seen.named("li") if "class" in attributes]
    assert options and all(one == {"class": "truth"} for one in options)
    text = " ".join(seen.texts)
    assert "stem" in text and "Jan Vermeer" in text and "['10', '12', '14']" in text and re.search(r"worth 0\.\d", text)


def test_what_went_wrong_is_there(tmp_path):
    def spoil(rows, answers):
        answers[0] = answer(rows[0], None, refused="its picture is none")
        answers[1] = answer(rows[1], "It goes on", finish_reason="length")
        rows[2] = replace(rows[2], pictures=no_picture)

    def no_picture():
        raise InputError("index 2: cut short")
    text = " ".join(Seen(written(tmp_path, [result("AI2D", change=spoil, broken=[Broken(None, 4, "3 cells")])])).texts)
    for part in ("Not asked: its picture is none", "cut at the limit", "index 2: cut short", "line 4: 3 cells"):
        assert part in text, part


def test_pictures_are_small(tmp_path):
    def large(rows, answers):
        rows[0] = replace(rows[0], pictures=lambda: [picture(1, (900, 300)), picture(2, (10, 4000)).convert("RGBA")])
    images = Seen(written(tmp_path, [result("AI2D", 1, change=large)])).named("img")
    assert [(one["width"], one["height"]) for one in images] == [("320", "107"), ("1", "320")]
    assert all(one["src"].startswith("data:image/jpeg;base64,") for one in images)


def test_a_large_run_is_shown_in_part(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "MOST", 20)
    of = result("AI2D", 100, share=0.8)
    text = written(tmp_path, [of, result("MMVet", 4)])
    assert text.count("<article") == 14 and "On this page are 10 of 100 of AI2D_TEST.default" in text
    chosen = page.choose(of, 10)
    assert sum(of.verdicts[i].right == 1 for i in chosen) == 5 and max(chosen) > 70 and chosen == sorted(set(chosen))
    assert page.choose(of, 100) == page.choose(of, 500) == list(range(100))
    for share in (0, 1):
        assert len(page.choose(result("AI2D", 50, share=share), 10)) == 10
    assert "All questions are on this page" in written(tmp_path, [result("MMVet", 4)])


# ---- strangers ------------------------------------------------------------------------------------------------------

ATTACK = ("</script></style><script>alert(1)</script><img src=x onerror=alert(2)>\" ' onfocus=alert(3) x='\u202e\0 "
          "\ud800 &lt;")


def attacked():
    """A run with that in every field that a stranger, a model or a judge can fill."""
    def attack(rows, answers):
        for i, row in enumerate(rows):
            fields = {name: ATTACK if name not in ("split",) else text for name, text in row.fields.items()}
            rows[i] = replace(row, index=f"{ATTACK}{i}", pictures=no_picture, fields={
                **fields, "hint": ATTACK, "choices": ATTACK, "answer_option": ATTACK, "A": ATTACK})
            answers[i] = answer(rows[i], ATTACK, question=ATTACK, said=ATTACK, refused=ATTACK if i == 2 else None,
                                finish_reason=ATTACK)

    def no_picture():
        raise InputError(ATTACK)
    of = result("MMStar", change=attack, differences=[ATTACK], broken=[Broken(ATTACK, 2, ATTACK)])
    verdicts = [Verdict(row.index, ATTACK, 0.5 if i else None, "judge", ATTACK) for i, row in enumerate(of.rows)]
    return replace(of, verdicts=verdicts, numbers={"score": 50.0, ATTACK: 1.0})


def test_texts_stay_texts(tmp_path):
    of = attacked()
    text = written(tmp_path, [of], checkpoint=ATTACK, judge=ATTACK, judge_model=ATTACK, scorers=ATTACK)
    seen = Seen(text)
    assert len(seen.named("script")) == len(seen.named("style")) == 1 and not seen.named("iframe")
    assert not seen.named("img") and not any(name.startswith("on") for _, given in seen.tags for name in given)
    shown = ATTACK.replace("\ud800", "?")
    assert " ".join(seen.texts).count(shown) > 12 * len(of.rows)
    attributes = [(tag, name) for tag, given in seen.tags for name, value in given.items() if "alert" in (value or "")]
    assert not attributes


def test_nothing_is_fetched(tmp_path):
    text = written(tmp_path, [result("MMStar")])
    assert not re.search(r"https?:|url\(|@import|fetch\(|import\(|innerHTML|eval", text)
    (policy,) = [meta["content"] for meta in Seen(text).named("meta") if "http-equiv" in meta]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-") and "unsafe" not in policy


# ---- in a browser ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("browser")) as page:
        yield page


SHOWN = "articles.filter(one => !one.hidden && one.checkVisibility()).length"


@pytest.mark.slow
def test_filters(tab, tmp_path):
    of = eight(n=12)
    written(tmp_path, of)
    tab.look(900, 800)
    tab.open((tmp_path / "report.html").as_uri())
    total = sum(len(one.rows) for one in of)
    choose = lambda name, words: tab.js(f"""(() => {{ const of = $('{name}');
        of.value = [...of.options].find(one => one.textContent.startsWith({words!r})).value;
        of.dispatchEvent(new Event('change')); return {SHOWN} }})()""")
    assert tab.js(SHOWN) == total and tab.js("$('count').textContent") == f"{total} of {total} questions"
    star = of[1]
    assert choose("benchmark", "MMStar") == len(star.rows)
    assert choose("category", "math") == len([row for row in star.rows if row.fields["category"] == "math"])
    wrong = [v for row, v in zip(star.rows, star.verdicts) if row.fields["category"] == "math" and v.right == 0]
    assert choose("state", "wrong") == len(wrong) > 0
    assert choose("benchmark", "OCRBench") == sum(v.right == 0 for v in of[6].verdicts) > 0     # no category any more
    assert choose("state", "all") == 12
    tab.js("document.body.focus()")
    tab("Input.dispatchKeyEvent", type="keyDown", key="/", text="/")
    assert tab.js("document.activeElement.id") == "text"
    tab.type("TOWER")
    assert tab.js(SHOWN) == sum("TOWER" in row.fields["answer"] for row in of[6].rows) > 0
    tab.type(" never")
    assert tab.js(SHOWN) == 0 and not tab.js("$('none').hidden") and not tab.errors


@pytest.mark.slow
def test_keys(tab, tmp_path):
    written(tmp_path, [result("AI2D", 6)])
    tab.open((tmp_path / "report.html").as_uri())
    press = lambda key: tab("Input.dispatchKeyEvent", type="keyDown", key=key, text=key) and None or tab.js(
        "document.activeElement.id")
    assert [press(key) for key in "jjjkkk"] == ["q0", "q1", "q2", "q1", "q0", "q0"]
    tab.js("$('state').value = marks[0].values().toArray().at(-2); $('state').onchange()")
    assert press("/") == "text" and press("j") == "text" and tab.js("$('text').value") in ("j", "/j"[1:])


@pytest.mark.slow
@pytest.mark.parametrize("width, dark", [(1100, False), (1100, True), (360, False), (360, True)])
def test_look(tab, tmp_path, width, dark):
    def long(rows, answers):
        answers[0] = answer(rows[0], "x" * 300)
    written(tmp_path, [*eight(n=3), result("AI2D", 3, change=long, setting="cot")])
    tab.look(width, 900, dark)
    tab.open((tmp_path / "report.html").as_uri())
    assert tab.js("document.documentElement.scrollWidth") == width and not tab.errors
    tab.js("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert tab.js("document.documentElement.scrollWidth") == width
    light = tab.js("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]")
    assert (int(light) < 60) == dark


@pytest.mark.slow
def test_the_policy_holds(tab, tmp_path):
    """Even what came in as an element would not run."""
    written(tmp_path, [attacked()])
    tab.open((tmp_path / "report.html").as_uri())
    assert tab.js("$('count').textContent") == "8 of 8 questions" and not tab.errors
    tab.js("""window.ran = 0; const one = document.createElement('div');
              one.innerHTML = '<img src=x onerror="ran = 1"><p style="color: red">x</p>'; document.body.append(one);
              const script = document.createElement('script'); script.textContent = 'ran = 1';
              document.body.append(script)""")
    assert tab.js("new Promise(done => setTimeout(() => done(ran), 100))") == 0
    assert len(tab.errors) >= 3
    tab.errors.clear()
