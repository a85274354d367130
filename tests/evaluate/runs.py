"""Results of runs that never were: invented questions, answers right or wrong by chance, the true scorers."""
import base64
import random

from made import MAKERS, picture, right

from minivl.media import load_image
from weights_tools.evaluate import score
from weights_tools.evaluate.benchmarks import BENCHMARKS, Answer, Row
from weights_tools.evaluate.results import Result

SETTINGS = {"checkpoint": "OpenGVLab/InternVL2_5-4B-MPO-AWQ", "digest": "0123456789abcdef", "precision": "exact",
            "dtype": "bfloat16", "device": "cpu", "mpo_prompt": True, "limit_tiles": None, "max_new_tokens": 4096,
            "n": None, "seed": 0, "judge": None, "judge_model": None, "scorers": "2024", "data": "nowhere"}


def row(fields: dict, line: int) -> Row:
    """A row as tsv.read gives it."""
    image = fields["image"]
    pictures = (lambda: [load_image(base64.b64decode(image))]) if image and len(image) > 64 and image[0] != "[" else (
        lambda: [picture(line), picture(line + 1)])
    return Row(fields["index"], {name: value for name, value in fields.items() if name not in ("index", "image")},
               pictures, line)


def answer(of: Row, prediction: str | None, **more) -> Answer:
    given = {"question": f"<image>\n{of.fields['question']}", "prediction": prediction, "said": None, "tiles": (2,),
             "tokens": 5, "seconds": 0.5, "finish_reason": "stop"}
    return Answer(of.index, **{**given, **more})


def result(name: str, n=8, share=0.7, seed=0, setting="default", change=None, **more) -> Result:
    """A run of one benchmark with about that share of right answers. change(rows, answers) alters them before scoring.

    Runs of different seeds differ in answers, not in questions.
    """
    benchmark = BENCHMARKS[name]
    made = [one for one in MAKERS[name](n) if one["image"]]
    rows = [row(one, line) for line, one in enumerate(made, start=2)]
    chance = random.Random(f"{name} {seed}")
    said = {"Yes": "No", "No": "Yes"}
    answers = [answer(of, str(right(name, one)) if chance.random() < share else
                      said.get(str(one["answer"]), "I cannot say.")) for of, one in zip(rows, made)]
    if change:
        change(rows, answers)
    judge = (lambda prompt, temperature: str(chance.randrange(11) / 10)) if name == "MMVet" else None
    verdicts = score.verdicts(benchmark, rows, [one.prediction for one in answers], judge=judge)
    given = {"differences": [], **more}
    return Result(benchmark, benchmark.datasets[0], setting, rows, answers, verdicts,
                  score.numbers(benchmark, rows, verdicts), **given)


def eight(**more) -> list[Result]:
    return [result(name, **more) for name in BENCHMARKS]
