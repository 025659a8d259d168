"""A frontend of its own: three calls of compact_fast, any model, any loop.

python examples/own_loop.py [BACKEND]     # three teachers add, one is off by one: which?
"""

import sys

import torch

from compact_fast import TokenLayout, compact_loss, consensus

VOCAB = {word: i for i, word in enumerate([*"0123456789+=.", "So"])}
LENGTH, TEACHERS = 9, 3


def rationales(a, b):
    """Two teachers are right, the second in another order; the third is not."""
    told = ((a, b, a + b), (b, a, a + b), (a, b, a + b - 1))
    return [f"{x} + {y} = {z} . So {z} ." for x, y, z in told]


def lay_out(texts, sums):
    ids = torch.tensor([[VOCAB[word] for word in text.split()] for text in texts])
    targets = ids.roll(-1, 1)
    targets[:, :2] = targets[:, -1] = -100  # the question "a + b" has no labels
    s = torch.arange(len(texts))[:, None]  # a teacher that is right states the sum behind "So"
    return TokenLayout(
        targets=targets.flatten(),
        cu_seqlens=torch.arange(len(texts) + 1) * LENGTH,
        cu_teachers=torch.arange(len(sums) + 1) * TEACHERS,
        input_ids=ids.flatten(),
        thinking=ids.flatten() == VOCAB["So"],
        gold_ids=torch.tensor([VOCAB[str(n)] for n in sums]),
        cu_gold=torch.arange(len(sums) + 1),
        answer_spans=(s * LENGTH + torch.tensor([6, 7])) * (s % TEACHERS < 2),
    )


def main(backend="auto", steps=60):
    torch.manual_seed(0)
    pairs = [(a, b) for a in range(1, 5) for b in range(1, 5)]
    texts = [text for pair in pairs for text in rationales(*pair)]
    layout = lay_out(texts, [a + b for a, b in pairs])
    scores = torch.tensor(consensus(texts, layout.cu_teachers.tolist()).scores).float()
    words, mix = torch.nn.Embedding(len(VOCAB), 32), torch.nn.GRU(32, 32, batch_first=True)
    head = torch.nn.Linear(32, len(VOCAB), bias=False)
    optimizer = torch.optim.Adam(torch.nn.ModuleList([words, mix, head]).parameters(), 1e-2)
    for step in range(steps):
        hidden = mix(words(layout.input_ids.view(-1, LENGTH)).tanh())[0].flatten(0, 1)
        out = compact_loss(hidden, head.weight, layout, consensus=scores, backend=backend)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == steps - 1:
            weights = " ".join(f"{w:.3f}" for w in out.weights.view(-1, TEACHERS).mean(0))
            print(f"step {step:3d}  loss {out.loss:.3f}  weights {weights}")


if __name__ == "__main__":
    main(*sys.argv[1:])
