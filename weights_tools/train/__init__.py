"""Train anything: optimisers, what is learned of a text, a step, a loop that can be stopped at any time.

    optimisers.py   Muon, AdamW, the learning rate
    objective.py    text -> labels on the answers -> logits where an answer is learned
    step.py         losses of micro-batches -> gradients, clipped -> one step
    loop.py         steps, state file, log, bar

Nothing here knows a data set or a model by name. Nano's training (weights_tools.nano.train) is its first user.
"""
