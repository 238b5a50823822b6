"""Every constant of judgement, with its reason. What is derived (rounding bounds) is in `refgemma.oracle.bounds`."""

# ---- Chance

# Probability with which the honest roundings of one tensor stray beyond what is called likely. A trace has some hundred
# tensors, so one honest trace in ten thousand has a suspicious one.
STRAY = 1e-6

# Units in the last place that a library may be off by in exp, tanh, cos, sin or a power, each at most two unit
# roundoffs of the result. glibc, SLEEF (which torch vectorises with), NumPy and CUDA state or were measured to stay
# within it (Zimmermann, 2021; see `refgemma.oracle.bounds.elementwise`); the tests measure NumPy and torch again.
LIBRARY = 4

# ---- Where bounds are statistical

# Over operations that were not given worst cases multiply, each by the square root of a width or so, until they exclude
# nothing. There "wrong" begins at this multiple of what chance explains. Honest runs, measured on traces that hold
# nothing but each layer's output, or the logits alone, stay below an eighth of that.
BRIDGED = 3.0

# Seeds of the free run's noise; fixed, so that a verdict can be repeated. Eight runs: the scatter of one position, if
# it is along one direction only, is then estimated too small by a factor of 3 once in a thousand (chi squared of 8
# below 8 / 9), which `DRIFTED` makes up for. Two runs would be so far off once in ten.
SEEDS = tuple(range(8))

# A free run is wrong at this multiple of what chance explains.
DRIFTED = 3.0

# ---- The arithmetic, recognised from the numbers

EXAMINED = 12  # tensors: with more than half of them narrow, chance is out of the question
NUMBERS = 2**20  # of each: a bfloat16 number is one float32 number in 65536

# A float32 run that was only stored in a narrow format is off in most kinds of operation; a bug is in few. Judged as
# float32 hardly any may be left.
STORED_WRONG = 0.5  # of the kinds of operation that were given, at least
STORED_LEFT = 0.25  # of those kinds, at most

# ---- Patterns: when an explanation of errors is given in words

LEFT = 0.05  # of the error's norm may be left: a wrong formula leaves a large part of it
F_RATIO = 8.0  # or, within rounding, times the variance per number that was fitted (an F test far beyond 1 in 1000)
WITHIN = 1.05  # times the slack counts as within rounding: a fitted factor is itself off a little
PEAK = 30.0  # without a bound, a number is wrong when its error is not below the largest by this factor
TELLING = 10  # wrong numbers: by chance all lie in one half of an axis once in 1000
NO_CHANCE = 20.0  # natural log of the odds against all numbers outside a region being right by luck
GROWTH_POSITIONS = 6  # fewer positions rank in one order too easily
GROWTH_RANK = 0.9  # rank correlation of error and position
GROWTH_TIMES = 3.0  # last third of the positions against the first

# ---- Diagnosis: when a bug explains the numbers

CLOSER = 10.0  # times less misfit than without the bug: no coincidence

# The same for final logits alone. Measured where it is hardest, with roundings that fall either way in every layer, the
# right explanation is 12 times closer or more, a related one up to 1.4 times.
CLOSER_LOGITS = 4.0

# Explanations whose misfit is within this factor of the best are as good: misfits of right ones are rounding noise, and
# differ by chance; those of wrong ones are a hundred times larger, or more.
TIE = 3.0

MEASURED = 6  # explanations whose budget is measured before one has been found that is inside it
REACH = 10.0  # times its own effect, by which a bug may move the logits beside another bug
OVERFLOW = 1.8e19  # larger numbers have no square in float32 and bfloat16
