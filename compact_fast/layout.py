"""TokenLayout: where questions, teachers and labels lie in one packed, ragged batch.

Shape suffixes: T packed positions, S sequences (one a rationale), Q questions, G gold tokens.
Sequences lie one behind another; the sequences of a question lie one behind another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

IGNORE = -100


def _offsets(sizes: Tensor) -> Tensor:
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """One packed batch. Every tensor lies on one device; what a score does not need may be None.

    Raises ValueError naming the field, the place and the value when fields contradict each other.
    Validation reads values, so build layouts on the CPU and move them with `.to(device)`.
    """

    targets: Tensor  # [T] int64; the token that follows position t, or IGNORE (-100)
    cu_seqlens: Tensor  # [S+1] int64; sequence s holds positions cu_seqlens[s]..cu_seqlens[s+1]-1
    cu_teachers: Tensor  # [Q+1] int64; question q holds sequences cu_teachers[q]..[q+1]-1
    input_ids: Tensor | None = None  # [T] int64; the token read at position t
    thinking: Tensor | None = None  # [T] bool; the token read at t is a thinking token
    assistant: Tensor | None = None  # [T] bool; the token read at t is the assistant's. Derived
    #                                  from targets when None (t is, if the position before has a
    #                                  label)
    real: Tensor | None = None  # [T] bool; False at PAD positions of a padded batch. None: all real
    gold_ids: Tensor | None = None  # [G] int64; tokens of the gold answers, question by question
    cu_gold: Tensor | None = None  # [Q+1] int64; bounds of each question's gold tokens
    answer_spans: Tensor | None = None  # [S, 2] int64; packed positions [start, end) whose TARGETS
    #                                     state the gold answer; start == end: never stated
    prior_logp: Tensor | None = None  # [Q] float; log p(gold | question) in nats, for mi="pvi"
    teacher_ids: Tensor | None = None  # [S] int64; index into the run's teachers
    question_ids: Tensor | None = None  # [Q] int64; index into the data, keys weighting="random"
    correct: Tensor | None = None  # [S] int64; 1 right, 0 wrong, -1 unknown (counts as not right)

    _origin: ClassVar[TokenLayout | None] = (
        None  # on a layout that was moved: the one on the CPU that it was made from
    )

    def __post_init__(self) -> None:
        if not torch.compiler.is_compiling() and self.targets.device.type == "cpu":
            self.validate()

    # ---- sizes -------------------------------------------------------------------------------

    @property
    def num_tokens(self) -> int:
        return self.targets.numel()

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens.numel() - 1

    @property
    def num_questions(self) -> int:
        return self.cu_teachers.numel() - 1

    @property
    def device(self) -> torch.device:
        return self.targets.device

    # ---- derived, computed once ---------------------------------------------------------------

    @cached_property
    def sequence_lengths(self) -> Tensor:  # [S]
        return self.cu_seqlens.diff()

    @cached_property
    def teachers_per_question(self) -> Tensor:  # [Q]
        return self.cu_teachers.diff()

    @cached_property
    def token_sequence(self) -> Tensor:  # [T]; the sequence of each position
        return torch.repeat_interleave(
            torch.arange(self.num_sequences, device=self.device),
            self.sequence_lengths,
            output_size=self.num_tokens,
        )

    @cached_property
    def sequence_question(self) -> Tensor:  # [S]; the question of each sequence
        return torch.repeat_interleave(
            torch.arange(self.num_questions, device=self.device),
            self.teachers_per_question,
            output_size=self.num_sequences,
        )

    @cached_property
    def token_index(self) -> Tensor:  # [T]; position inside its sequence, from 0
        start = self.cu_seqlens[:-1][self.token_sequence]
        return torch.arange(self.num_tokens, device=self.device) - start

    @cached_property
    def labelled(self) -> Tensor:  # [T] bool; A(s) of the method, over all sequences
        return self.targets != IGNORE

    @cached_property
    def label_counts(self) -> Tensor:  # [S] int64; |A(s)|
        counts = torch.zeros(self.num_sequences, dtype=torch.long, device=self.device)
        return counts.index_add_(0, self.token_sequence, self.labelled.long())

    @cached_property
    def assistant_mask(self) -> Tensor:  # [T] bool
        if self.assistant is not None:
            return self.assistant
        before = torch.roll(self.labelled, 1)
        return before & (self.token_index > 0)

    @cached_property
    def real_mask(self) -> Tensor:  # [T] bool
        return torch.ones_like(self.labelled) if self.real is None else self.real

    @cached_property
    def last_real(self) -> Tensor:  # [S]; packed position of each sequence's last real token
        where = torch.arange(self.num_tokens, device=self.device)
        where = torch.where(self.real_mask, where, -1)
        last = torch.full((self.num_sequences,), -1, dtype=torch.long, device=self.device)
        return last.scatter_reduce_(0, self.token_sequence, where, "amax", include_self=True)

    @cached_property
    def teachers(self) -> Tensor:  # [S]; teacher ids, or the place within the question when unset
        if self.teacher_ids is not None:
            return self.teacher_ids
        start = self.cu_teachers[:-1][self.sequence_question]
        return torch.arange(self.num_sequences, device=self.device) - start

    # ---- construction ------------------------------------------------------------------------

    @classmethod
    def from_padded(
        cls,
        input_ids: Tensor,  # [S, L] int64
        attention_mask: Tensor,  # [S, L]; 1 at real tokens
        labels: Tensor,  # [S, L]; labels[t] is the token AT t (HF convention), IGNORE elsewhere
        cu_teachers: Tensor | Sequence[int],  # [Q+1]
        thinking_ids: Sequence[int] = (),
        **rest: Any,
    ) -> TokenLayout:
        """A padded batch as it stands, PAD positions included: T = S * L.

        Padding may be on either side. `rest` are further fields of the layout, already packed.
        """
        if input_ids.ndim != 2 or not (input_ids.shape == attention_mask.shape == labels.shape):
            raise ValueError(
                "input_ids, attention_mask and labels must share one shape [S, L]; got "
                f"{tuple(input_ids.shape)}, {tuple(attention_mask.shape)}, {tuple(labels.shape)}"
            )
        S, L = input_ids.shape
        targets = torch.full_like(labels, IGNORE)
        targets[:, :-1] = labels[:, 1:]
        ids = input_ids.reshape(-1)
        rest.setdefault("thinking", torch.isin(ids, ids.new_tensor(list(thinking_ids))))
        return cls(
            targets=targets.reshape(-1).long(),
            cu_seqlens=torch.arange(S + 1, device=ids.device) * L,
            cu_teachers=torch.as_tensor(cu_teachers, dtype=torch.long, device=ids.device),
            input_ids=ids,
            real=attention_mask.reshape(-1).bool(),
            **rest,
        )

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are set, by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> TokenLayout:
        """The same layout on another device."""
        if torch.device(device) == self.device:
            return self
        if self._origin is not None and torch.device(device).type == "cpu":
            return self._origin
        moved = TokenLayout(
            **{n: t.to(device, non_blocking=non_blocking) for n, t in self.tensors().items()}
        )
        if self.device.type == "cpu":
            object.__setattr__(moved, "_origin", self)
        return moved

    @property
    def on_host(self) -> TokenLayout:
        """The layout on the CPU that this one was moved from; where there is none, this one."""
        return self if self._origin is None else self._origin

    def select_questions(self, questions: Sequence[int]) -> TokenLayout:
        """A layout of only these questions, in this order; see `question_positions` for tokens."""
        chosen = [range(int(self.cu_teachers[q]), int(self.cu_teachers[q + 1])) for q in questions]
        seqs = torch.tensor([s for r in chosen for s in r], dtype=torch.long)
        tokens = self.question_positions(questions)
        cu_seqlens = _offsets(self.sequence_lengths[seqs])
        out: dict[str, Tensor] = {
            "targets": self.targets[tokens],
            "cu_seqlens": cu_seqlens,
            "cu_teachers": _offsets(torch.tensor([len(r) for r in chosen], dtype=torch.long)),
        }
        for name in ("input_ids", "thinking", "assistant", "real"):
            if (value := getattr(self, name)) is not None:
                out[name] = value[tokens]
        for name in ("teacher_ids", "correct"):
            if (value := getattr(self, name)) is not None:
                out[name] = value[seqs]
        for name in ("prior_logp", "question_ids"):
            if (value := getattr(self, name)) is not None:
                out[name] = value[list(questions)]
        if self.answer_spans is not None:
            shift = cu_seqlens[:-1] - self.cu_seqlens[:-1][seqs]
            out["answer_spans"] = self.answer_spans[seqs] + shift[:, None]
        if self.gold_ids is not None and self.cu_gold is not None:
            gold = [
                self.gold_ids[int(self.cu_gold[q]) : int(self.cu_gold[q + 1])] for q in questions
            ]
            out["gold_ids"] = torch.cat(gold) if gold else self.gold_ids[:0]
            out["cu_gold"] = _offsets(torch.tensor([g.numel() for g in gold], dtype=torch.long))
        return TokenLayout(**out)

    def question_positions(self, questions: Sequence[int]) -> Tensor:
        """Packed positions of these questions, in this order."""
        bounds = self.cu_seqlens[self.cu_teachers].tolist()
        parts = [torch.arange(bounds[q], bounds[q + 1]) for q in questions]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long)

    # ---- validation: in numpy, which takes a third of the time for so few numbers ---------------

    def validate(self) -> None:
        """Check every field against the others; called once on construction on the CPU."""
        for name, tensor in self.tensors().items():
            if not isinstance(tensor, Tensor):
                raise ValueError(f"layout.{name}: expected a tensor, got {type(tensor).__name__}")
            if tensor.device != self.targets.device:
                raise ValueError(
                    f"layout.{name} is on {tensor.device}, targets on {self.targets.device}"
                )
            self._check_dtype(name, tensor)
        T = self.num_tokens
        self._check_offsets("cu_seqlens", self.cu_seqlens, T, "positions (targets)")
        S = self.num_sequences
        self._check_offsets("cu_teachers", self.cu_teachers, S, "sequences (cu_seqlens)")
        Q = self.num_questions
        for size, names in (
            ((T,), ("targets", "input_ids", "thinking", "assistant", "real")),
            ((S,), ("teacher_ids", "correct")),
            ((Q,), ("prior_logp", "question_ids")),
            ((S, 2), ("answer_spans",)),
        ):
            for name in names:
                value = getattr(self, name)
                if value is not None and tuple(value.shape) != size:
                    raise ValueError(
                        f"layout.{name}: expected shape {size}, got {tuple(value.shape)}"
                    )
        self._check_values()

    def _check_values(self) -> None:
        targets = self.targets.numpy()
        bad = (targets < 0) & (targets != IGNORE)
        if bad.any():
            t = int(bad.argmax())
            raise ValueError(
                f"layout.targets[{t}] = {int(self.targets[t])}: "
                f"expected a token id >= 0 or {IGNORE}"
            )
        for name, cu in (("cu_seqlens", self.cu_seqlens), ("cu_teachers", self.cu_teachers)):
            bounds = cu.numpy()
            empty = bounds[1:] == bounds[:-1]
            if empty.any():
                i = int(empty.argmax())
                what = "sequence" if name == "cu_seqlens" else "question"
                raise ValueError(f"layout.{name}: {what} {i} is empty; leave it out of the batch")
        if (self.gold_ids is None) != (self.cu_gold is None):
            raise ValueError("layout.gold_ids and layout.cu_gold must be given together")
        if self.gold_ids is not None and self.cu_gold is not None:
            self._check_offsets("cu_gold", self.cu_gold, self.gold_ids.numel(), "gold tokens")
            if self.cu_gold.numel() != self.num_questions + 1:
                raise ValueError(
                    f"layout.cu_gold: {self.cu_gold.numel() - 1} questions, "
                    f"cu_teachers has {self.num_questions}"
                )
        if self.answer_spans is not None:
            start, end = self.answer_spans.numpy().T
            bounds = self.cu_seqlens.numpy()
            lo, hi = bounds[:-1], bounds[1:]
            bad = (start > end) | ((start != end) & ((start < lo) | (end > hi)))
            if bad.any():
                s = int(bad.argmax())
                raise ValueError(
                    f"layout.answer_spans[{s}] = {self.answer_spans[s].tolist()}: outside its "
                    f"sequence, positions {int(lo[s])} to {int(hi[s])}"
                )
        if self.real is not None and bool((self.last_real < 0).any()):
            s = int((self.last_real < 0).nonzero()[0])
            raise ValueError(f"layout.real: sequence {s} has no real token")

    @staticmethod
    def _check_dtype(name: str, tensor: Tensor) -> None:
        if name in ("thinking", "assistant", "real"):
            expected, good = "bool", tensor.dtype == torch.bool
        elif name == "prior_logp":
            expected, good = "a float dtype", tensor.is_floating_point()
        else:
            expected, good = "int64", tensor.dtype == torch.int64
        if not good:
            raise ValueError(f"layout.{name}: expected {expected}, got {tensor.dtype}")

    @staticmethod
    def _check_offsets(name: str, cu: Tensor, total: int, what: str) -> None:
        if cu.ndim != 1 or cu.numel() < 1:
            raise ValueError(f"layout.{name}: expected shape [n + 1], got {tuple(cu.shape)}")
        bounds = cu.numpy()
        if bounds[0] != 0 or bounds[-1] != total or (bounds[1:] < bounds[:-1]).any():
            raise ValueError(
                f"layout.{name}: offsets must rise from 0 to {total}, the number of {what}; "
                f"got {cu.tolist()[:8]}{'...' if cu.numel() > 8 else ''}"
            )
