"""How fast, and how near to what the machine can do: random weights of a named size, timed beside transformers.

Each engine runs in a process of its own and the processes take turns, round by round, so that a machine that warms up
or has other work slows all of them alike: ratios within a round are the result, seconds stand beside them.

Follow one run: `weights` makes a checkpoint, `run` starts the processes (`ours`, `peer`; both carry out one `plan`, and
ours then takes turns with the `limits`, see `beside`), `figures` collects what they say, `bars` and `report` tell what
it means, and `picture` draws it.
"""
