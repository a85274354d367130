"""Nano, the small trained model inside the package: its world, its training, its measuring.

    draw.py -> world.py          pictures and what is said about them
    recipe.py                    sizes, tokenizer, stages, sha256
    warmup.py, differences.py, data.py, train.py
                                 python -m weights_tools.nano.train OUT [--quick], by the core in weights_tools/train
    evaluate.py                  python -m weights_tools.nano.evaluate
    choices.py, twins.py, eight.py
                                 python -m weights_tools.nano.eight OUT, its own eight benchmarks
    int4.py                      python -m weights_tools.nano.int4 OUT
    lesson.py                    python -m weights_tools.nano.lesson OUT, something new to learn by weights_tools.lora
    asked.py                     questions that stand alone, answers judged and paired, for:
    web.py                       python -m weights_tools.nano.web OUT, a nano that errs, mended by preferences
    prefer.py                    python -m weights_tools.nano.prefer OUT, nano learns from its own answers
    ship.py                      python -m weights_tools.nano.ship FOLDER
"""
