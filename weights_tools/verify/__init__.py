"""Does this copy compute what the original computes, and if not, where does it first differ?

    reference.py    runs the original in an environment of its own and records every stage: a trace
    recording.py    reads such a trace, and shrinks it for the repository
    compare.py      runs minivl on the same input: stage by stage, the first that differs, what it looks like
    inputs.py       what four engines feed the model for one question
    report.py       the result as a table in the terminal and as one HTML page
    mistakes.py     planted mistakes, to show that all this can fail

`python -m weights_tools.verify --help`
"""
