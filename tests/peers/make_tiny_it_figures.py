"""Write the figures of the shipped model, as transformers computes them, to refgemma/oracle/published/data.

Run ``python -m tests.peers.make_tiny_it_figures`` where torch and transformers are installed, whenever weights/tiny-it
changes. No code of `refgemma` computes anything here: ids are SentencePiece's, and sums are NumPy's.
"""

import json
import math
from pathlib import Path

import numpy as np
import sentencepiece

from tests.peers.make_tiny_it_golden import FOLDER, load_peer

OUT = Path(__file__).parents[2] / "refgemma/oracle/published/data/tiny_it_figures.json"
MADE_BY = "https://github.com/huggingface/transformers/tree/v{version}/src/transformers/models/gemma"

STORY = "Once upon a time there was a"
QUESTION = "<start_of_turn>user\nWhat is 17 + 25?<end_of_turn>\n<start_of_turn>model\n"
OTHER_ANSWER = "It is 42, I think.<end_of_turn>"  # of its own answer it is so sure that every log-probability is 0
SMALL = "The capital of Hungary is Budapest which is located in Europe."

ABOUT = [
    "Figures of tiny-it, the model that comes with refgemma, recorded from transformers by"
    " tests/peers/make_tiny_it_figures.py; see gemma1_figures.json and gemma2_figures.json for kinds and fields.",
    "They show `refgemma verify` at work without a download.",
]
# Measured with the logits of tests/goldens/tiny_it.json: transformers' float32 is off by up to 4e-6 of the largest
# logit, which is about 30, refgemma's by 1.3e-6: 1.6e-4 together.
TOLERANCES = {
    "logit_mean": "0.0005: in a logit transformers' float32 is 1.2e-4 from float64, refgemma's 4e-5; thrice their sum",
    "logits_slice": "0.0005: as for the means",
    "hidden_slice": "0.0005: as for the means; hidden states are no larger than logits here",
    "token_logprob": "0.001: as for the means, and a logarithm of a sum whose logits are off as well",
    "cross_entropy": "0.001 bits: a mean of the above",
    "topk_prob": "0.0005 of 1: a logit off by d moves a probability p by d p (1 - p) at most",
    "entropy": "0.005 bits: probabilities off by 0.001 of themselves, times at most 5 bits each",
    "greedy_text": "the recorded token is our best, or below it by at most 0.02, as for published figures",
    "reply_contains": "the text is part of the recorded greedy reply",
}


def main():
    """Compute and write."""
    import torch
    import transformers

    from refgemma.files.safetensors import read_safetensors
    from refgemma.oracle.published.verify import checksums  # a format, no figure

    spm = sentencepiece.SentencePieceProcessor(model_file=str(FOLDER / "tokenizer.model"))
    peer = load_peer("float32")

    def run(ids):
        with torch.no_grad():
            out = peer(input_ids=torch.tensor([ids]), use_cache=False, output_hidden_states=True)
        return out.logits[0].double().numpy(), [h[0].double().numpy() for h in out.hidden_states]

    def log_probs(ids):
        logits = run(ids)[0]
        return [row[i] - math.log(math.fsum(np.exp(row))) for row, i in zip(logits, ids[1:], strict=False)]

    def greedy(ids, count):
        tensor = torch.tensor([ids])
        out = peer.generate(tensor, attention_mask=torch.ones_like(tensor), do_sample=False, max_new_tokens=count)
        return out[0, len(ids) :].tolist()

    story, question, small = ([spm.bos_id(), *spm.encode(text)] for text in (STORY, QUESTION, SMALL))
    logits, hidden = run(story)
    last = logits[-1]
    probs = np.exp(last - last.max())
    probs /= probs.sum()
    single = [i for i in np.argsort(-probs, kind="stable").tolist() if spm.encode(spm.decode([i])) == [i]][:5]
    columns = [3, 277, 500, 769, 999]
    reply, other = greedy(question, 24), spm.encode(OTHER_ANSWER)
    nats = math.log(len(last)) - math.fsum(log_probs(small))
    answer = spm.decode(reply).replace("<end_of_turn>", "").rstrip(".").split()[-1]

    figures = [
        figure("story/mean", "logit_mean", ids=story, expected=rounded(logits.mean(axis=-1)), atol=0.0005),
        figure("story/mean/text", "logit_mean", text=STORY, bos=True, expected=rounded(logits.mean(-1)), atol=0.0005),
        figure("story/slice", "logits_slice", ids=story, position=4, columns=columns,
               expected=rounded(logits[4, columns]), atol=0.0005),
        figure("story/final-norm", "hidden_slice", ids=story, position=4, columns=[0, 1, 92, 183],
               expected=rounded(hidden[-1][4, [0, 1, 92, 183]]), atol=0.0005),
        figure("story/embedding", "hidden_slice", at="embed", ids=story, position=1, columns=[0, 1, 183],
               expected=rounded(hidden[0][1, [0, 1, 183]]), atol=0.0005),
        figure("story/layer-2", "hidden_slice", at="layers.2.out", ids=story, position=7, columns=[5, 60, 183],
               expected=rounded(hidden[3][7, [5, 60, 183]]), atol=0.0005),
        figure("story/logprobs", "token_logprob", ids=story, first=1, expected=rounded(log_probs(story)), atol=0.001),
        figure("answer/logprobs", "token_logprob", ids=question + other, first=len(question),
               expected=rounded(log_probs(question + other)[len(question) - 1 :]), atol=0.001),
        figure("small/cross-entropy", "cross_entropy", text_ref="small", bos=True,
               expected=round(nats / math.log(2) / len(SMALL.encode()), 6), atol=0.001),
        figure("story/top", "topk_prob", text=STORY, bos=True, pieces=[spm.decode([i]) for i in single],
               expected=rounded(probs[single]), atol=0.0005),
        figure("story/entropy", "entropy", text=STORY, bos=True,
               expected=round(float(-(probs * np.log2(probs)).sum()), 6), atol=0.005),
        figure("story/greedy", "greedy_text", ids=story, new_tokens=16, continuations=[greedy(story, 16)]),
        figure("question/greedy", "greedy_text", ids=question, new_tokens=len(reply), continuations=[reply]),
        figure("question/reply", "reply_contains", text=QUESTION, expected=answer, max_tokens=24),
    ]  # fmt: skip
    stored = read_safetensors(FOLDER / "model.safetensors")
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    note = f"{versions}, float32, eager attention, no cache; made by tests/peers/make_tiny_it_figures.py"
    held = {
        "family": "gemma1",
        "about": ABOUT,
        "tolerances": TOLERANCES,
        "checksums": {"tiny-it": checksums(stored)},
        "sources": {"transformers": {"url": MADE_BY.format(version=transformers.__version__), "note": note}},
    }
    head = json.dumps(held, indent=1, ensure_ascii=False).removesuffix("\n}")
    lines = ",\n".join("  " + json.dumps(entry, ensure_ascii=False) for entry in figures)
    part = OUT.with_suffix(".part")
    part.write_text(f'{head},\n "figures": [\n{lines}\n ]\n}}\n', encoding="utf-8")
    part.replace(OUT)


def figure(name, kind, **fields):
    """One entry of the file."""
    about = {"source": "transformers", "trust": "high", "computed_in": "float32"}
    return {"id": f"tiny-it/{name}", "models": ["tiny-it"], "kind": kind} | about | fields


def rounded(values):
    """Six decimals, a hundredth of the tolerance."""
    return [round(float(v), 6) for v in values]


if __name__ == "__main__":
    main()
