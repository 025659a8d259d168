"""A frontend of its own: three calls of compact_fast, any model, any loop.

    python examples/own_loop.py [BACKEND]

Two teachers explain how to add; one of them is off by one. The weights find out which.
"""

import sys
from itertools import chain

import torch

from compact_fast import CompactConfig, TokenLayout, compact_loss, consensus

VOCAB = {word: i for i, word in enumerate([*"0123456789+=.", "So"])}


def rationale(a, b, result):
    return f"{a} + {b} = {result} . So {result} ."


def batch(pairs):
    """Three teachers a question: two right in different words' order, one wrong."""
    texts, targets, inputs, spans, gold = [], [], [], [], []
    for a, b in pairs:
        for text in (rationale(a, b, a + b), rationale(b, a, a + b), rationale(a, b, a + b - 1)):
            ids = [VOCAB[word] for word in text.split()]
            start = sum(map(len, inputs))
            inputs.append(ids)
            targets.append([-100, -100, *ids[3:], -100])  # the question "a + b" has no labels
            right = text.split()[4] == str(a + b)
            spans.append([start + 6, start + 7] if right else [0, 0])
            texts.append(text)
        gold.append(VOCAB[str(a + b)])
    flat = torch.tensor([*chain(*inputs)])
    return texts, TokenLayout(
        targets=torch.tensor([*chain(*targets)]),
        cu_seqlens=torch.tensor([0, *map(len, inputs)]).cumsum(0),
        cu_teachers=torch.arange(len(pairs) + 1) * 3,
        input_ids=flat,
        thinking=flat == VOCAB["So"],
        gold_ids=torch.tensor(gold),
        cu_gold=torch.arange(len(pairs) + 1),
        answer_spans=torch.tensor(spans),
    )


def main(backend="auto", steps=60):
    torch.manual_seed(0)
    pairs = [(a, b) for a in range(1, 5) for b in range(1, 5)]
    texts, layout = batch(pairs)
    agreement = torch.tensor(consensus(texts, layout.cu_teachers.tolist()).scores).float()
    body = torch.nn.Sequential(torch.nn.Embedding(len(VOCAB), 32), torch.nn.Tanh())
    mix, head = torch.nn.GRU(32, 32), torch.nn.Linear(32, len(VOCAB), bias=False)
    optimizer = torch.optim.Adam([*body.parameters(), *mix.parameters(), *head.parameters()], 1e-2)
    for step in range(steps):
        rows = [
            mix(body(ids))[0] for ids in layout.input_ids.split(layout.sequence_lengths.tolist())
        ]
        out = compact_loss(
            torch.cat(rows), head.weight, layout, consensus=agreement, config=CompactConfig(),
            backend=backend,
        )  # fmt: skip
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == steps - 1:
            weights = out.weights.view(-1, 3).mean(0)
            shown = " ".join(f"{w:.3f}" for w in weights)
            print(f"step {step:3d}  loss {out.loss:.3f}  weights {shown}")
    return out


if __name__ == "__main__":
    main(*sys.argv[1:])
