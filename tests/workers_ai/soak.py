"""Many streaming clients for a while: is anything lost or mixed up, and does memory stay flat?

By hand: ``python -m tests.workers_ai.soak --clients 32 --seconds 60``. The server is a process of its own. Every answer
is compared with the one that the same request gets alone, in this process; where they differ, the first token that
differs must be one that a rounding in float32 decides. One request in ten is dropped half-way by its client.
"""

import argparse
import collections
import functools
import itertools
import json
import random
import threading
import time
from pathlib import Path

from refgemma.workers_ai import AI
from refgemma.workers_ai.pages import GEMMA_2B
from tests.workers_ai.server.live import RUN, events, sent
from tests.workers_ai.server.process import started

LORAS = (None, None, "pirate", "json", "letter")
PROMPTS = ("What is 17 + 25?", "Tell me a story about a fox.", "What is the capital of Nepal?", "Who are you?", "Hi!")
DROPPED = 0.1


class Soak:
    """Shared by the clients; what they saw."""

    def __init__(self, address, seconds):
        self.address = address
        self.end = time.monotonic() + seconds
        self.seen = collections.Counter()
        self.wrong = []
        self.waits = []  # seconds to the first event
        self.lock = threading.Lock()
        self.ai = AI({GEMMA_2B: "tiny-it"}, loras={name: name for name in LORAS if name})

    @functools.cache  # noqa: B019  one object, for the life of the program
    def alone(self, request):
        """The bytes of the same request without company."""
        return b"".join(self.ai.run(GEMMA_2B, json.loads(request)))

    def client(self, number):
        """Ask until the time is up."""
        rng = random.Random(number)
        while time.monotonic() < self.end:
            inputs = {"prompt": rng.choice(PROMPTS), "seed": rng.randint(1, 20), "temperature": 0.8, "stream": True}
            lora = rng.choice(LORAS)
            inputs |= {"lora": lora} if lora else {}
            began = time.monotonic()
            with sent(self.address, RUN, inputs) as response:
                first = response.readline()
                waited = time.monotonic() - began
                if rng.random() < DROPPED:
                    self.count("dropped by the client")
                    continue
                body = first + response.read()
            with self.lock:
                self.waits.append(waited)
            if response.status != 200:
                self.count(f"status {response.status}")
            elif not body.endswith(b"data: [DONE]\n\n"):
                self.wrong.append((inputs, body))
                self.count("lost its end")
            else:
                self.count("answered")
                self.seen["tokens"] += events(body)[-2]["usage"]["completion_tokens"]
                self.judge(inputs, body)

    def count(self, what):
        with self.lock:
            self.seen[what] += 1

    def judge(self, inputs, body):
        """Compare later: computing here would slow the clients down."""
        with self.lock:
            self.wrong.append((inputs, body))

    def differences(self):
        """Answers that differ from the one alone, and how near a tie the first difference is."""
        given = collections.Counter((json.dumps(inputs), body) for inputs, body in self.wrong)
        for (request, body), times in given.items():
            if body != self.alone(request):
                yield json.loads(request), times, self.near_tie(json.loads(request), body)

    def near_tie(self, inputs, body):
        """Whether rounding decides the first token that differs: by the record of the answer alone."""
        request = self.ai.read(GEMMA_2B, inputs)
        gemma = self.ai.gemma(request)
        tokens = request.tokens(gemma)
        (out,) = [e.result for e in gemma._events([tokens], request.settings(gemma, tokens), record=True) if e.result]
        text = "".join(chunk["response"] for chunk in events(body)[:-2])
        common = len([1 for a, b in itertools.takewhile(lambda p: p[0] == p[1], zip(text, out.text, strict=False))])
        spelled = list(itertools.accumulate(len(gemma.tokenizer.decode([t])) for t in out.tokens))
        at = next(i for i, length in enumerate(spelled) if length > common)
        return out.record[at].near_tie is not None


def resident(pid):
    """Megabytes of memory of a process."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60)
    args = parser.parse_args()
    with started() as (address, _, process):
        soak = Soak(address, args.seconds)
        threads = [threading.Thread(target=soak.client, args=(n,)) for n in range(args.clients)]
        for thread in threads:
            thread.start()
        memory = []
        while any(thread.is_alive() for thread in threads):
            memory.append(resident(process.pid))
            time.sleep(1)
        for thread in threads:
            thread.join()
        rest = memory[len(memory) // 4 :]  # the first requests load what is loaded once
        print(f"{args.clients} clients, {args.seconds:g} s: {dict(soak.seen)}")
        print(f"{soak.seen['tokens'] / args.seconds:.0f} tokens/s")
        waits = sorted(soak.waits)
        print(f"first event after {waits[len(waits) // 2]:.2f} s (median), {waits[-1]:.2f} s (longest)")
        quarters = [rest[0], rest[len(rest) // 3], rest[2 * len(rest) // 3], rest[-1]]
        print("memory, MB:", ", ".join(f"{mb:.0f}" for mb in [memory[0], *quarters]))
    differing = list(soak.differences())
    print(f"answers that differ from the one alone: {sum(times for _, times, _ in differing)}")
    for inputs, times, tie in differing:
        print(f"  {times} x {inputs}: {'a near-tie' if tie else 'NO near-tie'}")
    lost = soak.seen["answered"] + soak.seen["dropped by the client"] < sum(
        n for what, n in soak.seen.items() if what != "tokens"
    )
    return 1 if lost or not all(tie for _, _, tie in differing) else 0


if __name__ == "__main__":
    raise SystemExit(main())
