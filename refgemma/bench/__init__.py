"""How fast, and how near to what the machine can do: random weights of a named size, timed beside transformers.

Each engine runs in a process of its own. The processes take turns, round by round, so that a machine that slows down
slows all of them alike: ratios within a round are the result, seconds are context.

Follow one run: `run` makes a checkpoint and starts the processes; each does the same work (`engines`), and refgemma's
takes turns with what the machine can do (`limits`); `report` says what the numbers mean, and draws them.
"""
