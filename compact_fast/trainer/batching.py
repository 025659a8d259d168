"""Which questions share a forward pass, on which of several processes, and in which order.

Questions are never split. The order follows from seed and epoch alone, so that a run resumes at the
very question; an epoch has the same number of passes every time, on every process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

Ints = NDArray[np.int64]
IDLE = "idle"
"""A row with this key is read so that processes keep in step, and counts for nothing."""

_READ_AT_ONCE = 4096  # questions whose token ids are held while they are counted


def question_lengths(rows: Any) -> tuple[Ints, Ints, Ints, Ints]:
    """Of every question: prompt, sum and longest of its completions (tokens), and how many, [n]."""
    if hasattr(rows, "with_format"):
        parts = [_arrow_lengths(rows, start) for start in range(0, len(rows), _READ_AT_ONCE)]
    else:
        parts = [_lengths(rows)]
    prompt, total, longest, count = (np.concatenate(column) for column in zip(*parts, strict=True))
    return prompt, total, longest, count


def _lengths(rows: Sequence[Mapping[str, Any]]) -> tuple[Ints, ...]:
    sizes = [[len(c) for c in row["completion_ids"]] for row in rows]
    prompt = [len(row["prompt_ids"]) for row in rows]
    columns = (prompt, map(sum, sizes), (max(s, default=0) for s in sizes), map(len, sizes))
    return tuple(np.array(list(column), dtype=np.int64) for column in columns)


def _arrow_lengths(rows: Any, start: int) -> tuple[Ints, ...]:
    import pyarrow.compute as pc

    table = rows.select_columns(["prompt_ids", "completion_ids"]).with_format("arrow")
    table = table[start : start + _READ_AT_ONCE].combine_chunks()
    completions = table["completion_ids"].combine_chunks()
    count = pc.list_value_length(completions).to_numpy(zero_copy_only=False)
    sizes = pc.list_value_length(completions.flatten()).to_numpy(zero_copy_only=False)
    owner = np.repeat(np.arange(len(count)), count)
    total, longest = np.zeros(len(count), np.int64), np.zeros(len(count), np.int64)
    np.add.at(total, owner, sizes)
    np.maximum.at(longest, owner, sizes)
    prompt = pc.list_value_length(table["prompt_ids"].combine_chunks())
    return prompt.to_numpy(zero_copy_only=False).astype(np.int64), total, longest, count


def sequence_tokens(prompt: Ints, completions: Ints, longest: Ints, count: Ints) -> Ints:
    """Tokens of each question's sequences, given what `question_lengths` returns, [n].

    A prompt counts once for every rationale behind it.
    """
    return prompt * count + completions


def length_class(lengths: Ints) -> Ints:
    """Lengths rounded up by at most a sixteenth, so that many are equal."""
    step = 2 ** np.maximum(np.floor(np.log2(np.maximum(lengths, 1))).astype(np.int64) - 4, 0)
    rounded: Ints = -(-lengths // step) * step
    return rounded


def cut(sizes: Ints, budget: int, rows: Ints | None = None) -> list[tuple[int, int]]:
    """Runs [start, end) of questions, sizes falling, each within `budget` tokens.

    A question takes its size; with `rows`, so many rows padded to the run's first size. One that
    is above the budget is a run of its own.
    """
    runs: list[tuple[int, int]] = []
    start, load = 0, 0
    taken = sizes.tolist() if rows is None else rows.tolist()
    for i, more in enumerate(taken):
        unit = 1 if rows is None else int(sizes[start])
        if i > start and (load + more) * unit > budget:
            runs.append((start, i))
            start, load = i, 0
        load += more
    return [*runs, (start, len(sizes))] if len(sizes) else runs


def batches_within(sizes: Ints, budget: int, rows: Ints | None = None) -> list[list[int]]:
    """Places of questions of similar size in batches as `cut` makes them, the largest first."""
    order = np.argsort(-sizes, kind="stable")
    runs = cut(sizes[order], budget, None if rows is None else rows[order])
    return [order[a:b].tolist() for a, b in runs]


class QuestionBatches(Sampler[list[int]]):
    """The questions of each forward pass of one process; a place below zero only keeps it busy.

    `sizes` [n]: tokens that each question takes; with `rows` [n]: so many padded rows of that size.
    Either `questions` a pass and process, in random
    order; or at most `budget` tokens (a longer question goes alone): questions of similar size
    share a pass, anew in every epoch, and the passes come in random order. `together` passes make
    an optimizer step on each of the `world` processes: a step is the same set of questions however
    many processes share it, those of one pass are dealt out so that all have much the same to read.
    """

    def __init__(
        self,
        sizes: Ints,
        *,
        questions: int = 1,
        budget: int | None = None,
        rows: Ints | None = None,
        together: int = 1,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
    ) -> None:
        assert 0 <= rank < world
        self.loads = sizes if rows is None else sizes * rows
        self.questions, self.budget = questions, budget
        self.together, self.rank, self.world, self.seed = together, rank, world, seed
        self.epoch = 0
        if budget is None:
            self._passes = -(-len(sizes) // (questions * world))
            return
        # Within a class any order gives the same cuts, so that every epoch has as many passes.
        classes = length_class(sizes)
        alike = rows if rows is not None else np.zeros_like(sizes)
        self._falling = np.lexsort((-alike, -classes))
        self._same = np.stack([classes, alike], 1)[self._falling]
        self._runs = cut(
            classes[self._falling], budget, None if rows is None else rows[self._falling]
        )
        self._passes = -(-len(self._runs) // world)

    @property
    def oversized(self) -> int:
        """Questions above the budget."""
        return 0 if self.budget is None else int((self.loads > self.budget).sum())

    def set_epoch(self, epoch: int) -> None:
        """The order of the next iteration is that of this epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._passes

    def __iter__(self) -> Iterator[list[int]]:
        steps = self._counted() if self.budget is None else self._budgeted()
        for step in steps:
            for one_pass in step:
                yield one_pass[self.rank] or [-1 - one_pass[0][0]]

    def _random(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + self.epoch)

    def _counted(self) -> Iterator[list[list[list[int]]]]:
        """Steps of passes of each process's questions, `questions` each."""
        order = torch.randperm(len(self.loads), generator=self._random()).tolist()
        width = self.questions * self.world
        for start in range(0, len(order), width):
            chosen = order[start : start + width]
            yield [self._deal(chosen) if self.world > 1 else [chosen]]

    def _deal(self, chosen: list[int]) -> list[list[int]]:
        """Questions to processes, as equal in number as can be, and much the same in tokens."""
        dealt: list[list[int]] = [[] for _ in range(self.world)]
        loads = [0] * self.world
        for i in sorted(chosen, key=lambda i: (-self.loads[i], i)):
            at = min(range(self.world), key=lambda r: (len(dealt[r]), loads[r], r))
            dealt[at].append(i)
            loads[at] += int(self.loads[i])
        return dealt

    def _budgeted(self) -> Iterator[list[list[list[int]]]]:
        """Steps of passes of each process's questions, within the budget."""
        random = self._random()
        luck = torch.randperm(len(self.loads), generator=random).numpy()
        order = self._falling[np.lexsort((luck, -self._same[:, 1], -self._same[:, 0]))]
        runs = torch.randperm(len(self._runs), generator=random).tolist()
        step = self.together * self.world
        for start in range(0, len(runs), step):
            chosen = [order[slice(*self._runs[i])].tolist() for i in runs[start : start + step]]
            yield self._balanced(chosen)

    def _balanced(self, batches: list[list[int]]) -> list[list[list[int]]]:
        """The batches of one step as passes: in each, every process has much the same to read."""
        # The last step of an epoch may lack batches: halve some, then leave processes idle.
        passes = -(-len(batches) // self.world)
        while len(batches) < passes * self.world:
            largest = max(range(len(batches)), key=lambda b: (len(batches[b]), -b))
            if len(batches[largest]) == 1:
                batches.append([])
                continue
            one = batches[largest]
            batches[largest : largest + 1] = [one[::2], one[1::2]]
        batches.sort(key=lambda b: -int(self.loads[b].sum()) if b else 1)
        return [batches[i : i + self.world] for i in range(0, len(batches), self.world)]


class Questions(Dataset[dict[str, Any]]):
    """Rows by place; a place below zero is an idle row."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return self.__getitems__([place])[0]

    def __getitems__(self, places: Sequence[int]) -> list[dict[str, Any]]:
        """Those of one pass; the loader asks so, and a file is read in half the time."""
        at = [place if place >= 0 else -1 - place for place in places]
        together = getattr(self.rows, "__getitems__", None)
        rows = together(at) if together is not None else [self.rows[i] for i in at]
        idle = zip(rows, places, strict=True)
        return [{**row, IDLE: True} if place < 0 else row for row, place in idle]


class QuestionLoader(DataLoader[Any]):
    """A loader whose order follows the epoch.

    Without worker processes a thread makes the next batch while one is used.
    """

    def __iter__(self) -> Any:
        batches = super().__iter__()
        return batches if self.num_workers else _one_ahead(batches)

    def set_epoch(self, epoch: int) -> None:
        """The order of the next iteration is that of this epoch."""
        batches = self.batch_sampler
        assert isinstance(batches, QuestionBatches)
        batches.set_epoch(epoch)


def _one_ahead(batches: Iterator[Any]) -> Iterator[Any]:
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as thread:
        coming = thread.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield batch
