"""CompactTrainer: transformers' Trainer with this project's loss, logs and stops."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from compact_fast.backends import choose
from compact_fast.evaluate.rationales import rationale_nll
from compact_fast.inputs import mi_is_used
from compact_fast.lean import make_lean
from compact_fast.sharded_head import is_dtensor
from compact_fast.students import (
    attention_projections,
    causal_model,
    check_head,
    is_sharded,
    prepare_checkpointing,
)
from compact_fast.trainer.arguments import CompactTrainingArguments
from compact_fast.trainer.batching import (
    IDLE,
    QuestionBatches,
    QuestionLoader,
    Questions,
    question_lengths,
    sequence_tokens,
)
from compact_fast.trainer.callbacks import ProgressDisplay, RunFiles
from compact_fast.trainer.checkpoints import CheckpointedTrainer
from compact_fast.trainer.fusion import check_fusion, per_teacher_step
from compact_fast.trainer.guard import NonFiniteGuard
from compact_fast.trainer.sharding import in_step, refuse_parts, shard
from compact_fast.trainer.step import Collator, compact_step, run_spec, to_device, wrapped_body
from compact_fast.trainer.window import LogWindow

logger = logging.getLogger(__name__)

# Figures of the clock: logged, but kept out of the checkpoints' history, which repeats bit by bit.
_CLOCK = (
    *("tokens_per_second", "questions_per_second", "data_wait_share"),
    *("eval_runtime", "train_runtime"),
    *("train_samples_per_second", "train_steps_per_second"),
)


class CompactTrainer(CheckpointedTrainer):
    """Trains a student on whole questions with all their teachers' rationales.

    `train_dataset` and `eval_dataset` hold tokenised rows (`compact_fast.data`). The loss is the
    mean over the questions of the global batch: gradient accumulation and data parallelism change
    nothing but rounding. Writes run.json and metrics.jsonl into `args.output_dir`; `run_info` goes
    into run.json. `notes` are sentences for the user about what was left out and why.

    Raises ValueError for a student, rows or a configuration that do not go together, and
    NonFiniteError, before the update, when a loss or gradient is not finite.
    """

    args: CompactTrainingArguments
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module,
        args: CompactTrainingArguments,
        train_dataset: Any,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        callbacks: Sequence[TrainerCallback] = (),
        optimizers: tuple[Any, Any] = (None, None),
        run_info: Mapping[str, Any] | None = None,
    ) -> None:
        config = args.compact
        self.notes: list[str] = []
        refuse_parts(model)
        check_head(model)
        if config.consensus in ("attention", "both"):
            attention_projections(model)  # refuses now what it would refuse in the first step
        if args.fusion == "per_teacher":
            checkpointing = args.gradient_checkpointing_kwargs
            self.notes += check_fusion(model, config, len(args.teachers), checkpointing)
        train_dataset = self._usable(train_dataset, args)
        if args.gradient_checkpointing:
            prepare_checkpointing(model)
        make_lean(model)
        if args.n_gpu > 1:
            self.notes.append(
                f"{args.n_gpu} GPUs are visible, one is used; start with torchrun to use more"
            )
            args._n_gpu = 1
        collator = Collator.of(
            model,
            processing_class,
            config,
            args.thinking_ids,
            share_prompts=args.share_prompts,
            device=args.device,
            compiled=args.compile_body,
            autocast=torch.bfloat16 if args.bf16 else None,
        )
        self._packing = collator.packing
        if args.compile_body and self._packing.kind != "mask":
            raise ValueError(
                "compile_body=True: needs prompts shared through a mask, but "
                f"{self._packing.reason or 'this student keeps sliding windows'}"
            )
        if args.sharding == "fsdp":
            if optimizers[0] is not None:
                raise ValueError(
                    "optimizers: made before the student was sharded; name one by optim instead"
                )
            self.notes += shard(model, args.device)
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=list(callbacks),
            optimizers=optimizers,
        )
        if is_sharded(model):  # it lies where it belongs, and is no replica to be wrapped
            prepare = partial(self.accelerator.prepare_model, evaluation_mode=True)
            self.accelerator.prepare_model = prepare
        self._lengths = question_lengths(train_dataset)
        self.reading = self._describe_reading()
        logger.info("%s", self.reading["text"])
        dtype = torch.bfloat16 if args.bf16 else None
        self.choice = choose(args.backend, run_spec(model, args.device, dtype))
        logger.info("loss backend %s (%s)", self.choice.backend.name, self.choice.reason)
        self._window = LogWindow(args.teachers, args.device)
        self._guard = NonFiniteGuard(args.teachers, args.device)
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.files = RunFiles(
            {
                "reading": self.reading,
                "backend": {"name": self.choice.backend.name, "reason": self.choice.reason},
                "teachers": args.teachers,
                "device": str(args.device),
                **(run_info or {}),
            }
        )
        self.add_callback(self.files)
        self._display = ProgressDisplay(args.progress, args.teachers)
        self.add_callback(self._display)
        for note in self.notes:
            logger.warning(note)

    # ---- data --------------------------------------------------------------------------------

    def _usable(self, rows: Any, args: CompactTrainingArguments) -> Any:
        config = args.compact
        if not len(rows):
            raise ValueError("train_dataset holds no question")
        first = rows[0]
        graph = config.consensus in ("graph", "both") and config.weighting in (
            *("compact", "consensus", "best"),
        )
        if (graph or config.filter_below > 0) and first.get("consensus") is None:
            raise ValueError(
                f"consensus={config.consensus!r} needs the column `consensus` in the rows; add "
                "graph scores (compact_fast.graphs.consensus) or set consensus='none'"
            )
        if mi_is_used(config) and not first["gold_ids"]:
            raise ValueError(f"mi={config.mi!r} needs gold answers in the rows (gold_ids)")
        if isinstance(config.weighting, tuple) and len(config.weighting) != len(args.teachers):
            raise ValueError(
                f"weighting={config.weighting}: {len(config.weighting)} fixed weights for "
                f"{len(args.teachers)} teachers"
            )
        if config.weighting != "correct":
            return rows
        correct = rows["correct"] if hasattr(rows, "select") else [r["correct"] for r in rows]
        keep = [i for i, known in enumerate(correct) if 1 in known]
        if not keep:
            raise ValueError("weighting='correct': no question has a rationale known to be right")
        if len(keep) < len(rows):
            self.notes.append(
                f'weighting="correct": {len(rows) - len(keep)} of {len(rows)} questions left out, '
                "none of their rationales is right"
            )
        return rows.select(keep) if hasattr(rows, "select") else [rows[i] for i in keep]

    def _describe_reading(self) -> dict[str, Any]:
        """How rationales are packed, with the tokens of all questions and those that are saved."""
        prompt, _, _, count = self._lengths
        packing = self._packing
        tokens = int(sequence_tokens(*self._lengths).sum())
        if self.args.fusion == "per_teacher":  # whatever the student could share
            return {
                "packing": "alone",
                "shared_prompts": False,
                "reason": "fusion='per_teacher' reads one rationale at a time",
                "tokens": tokens,
                "tokens_saved": 0,
                "text": "one rationale at a time, behind its own prompt (fusion: per_teacher)",
            }
        saved = int((prompt * (count - 1)).sum()) if packing.shared else 0
        return {
            "packing": packing.kind,
            "shared_prompts": packing.shared,
            "reason": packing.reason,
            "tokens": tokens,
            "tokens_saved": saved,
            "text": packing.describe(len(prompt), tokens, saved),
        }

    def get_train_dataloader(self) -> QuestionLoader:
        """This process's forward passes, in the order of the epoch."""
        args = self.args
        sizes, rows = self._packing.sizes(*self._lengths)
        batches = QuestionBatches(
            sizes,
            questions=self._train_batch_size,
            budget=args.max_tokens_per_step,
            rows=rows,
            together=args.gradient_accumulation_steps,
            rank=args.process_index,
            world=args.world_size,
            seed=args.seed if args.data_seed is None else args.data_seed,
        )
        if batches.oversized:
            logger.warning(
                "max_tokens_per_step=%d: %d of %d questions are longer, each is read alone",
                *(args.max_tokens_per_step, batches.oversized, len(sizes)),
            )
        return QuestionLoader(
            Questions(self.train_dataset),
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = to_device(inputs, self.args.device)
        return found

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        """As the host's; the clock of the throughput runs from here."""
        self._window.open(self.state.global_step)
        return super().get_batch_samples(self._window.timed(epoch_iterator), *args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> int:
        """Questions in the global batch: what the loss is divided by."""
        count = torch.tensor(
            sum(len(b["ids"]) for b in batch_samples if IDLE not in b), device=device
        )
        return int(self._total(count).item())

    def _total(self, values: Tensor) -> Tensor:
        if self.args.world_size == 1:
            return values
        total: Tensor = self.accelerator.reduce(values.clone(), "sum")
        return total

    # ---- loss --------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The batch's share of the mean over the questions of the global batch."""
        apart = self.args.fusion == "per_teacher" and torch.is_grad_enabled()
        step = per_teacher_step if apart else compact_step
        with self.accelerator.autocast():
            out = step(
                wrapped_body(model),
                model,
                inputs,
                config=self.args.compact,
                backend=self.choice.backend,
                normalizer=None if num_items_in_batch is None else float(num_items_in_batch),
            )
        if model.training and IDLE not in inputs:
            self._window.add(out, inputs["layout"])
            self._guard.add(out, inputs["layout"], inputs["ids"])
        if IDLE in inputs:
            out = replace(out, loss=out.loss * 0.0)
        # Replicas average their gradients; the sum is already divided by the global count.
        loss = out.loss if num_items_in_batch is None else out.loss * self.args.world_size
        return (loss, out) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        if is_dtensor(grad_norm):
            grad_norm = grad_norm.full_tensor()
        self._guard.check(self.state.global_step + 1, grad_norm, self._total)
        return grad_norm

    # ---- evaluation --------------------------------------------------------------------------

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Held-out NLL a token, over all rationales and for each teacher, without weights."""
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if rows is None:
            raise ValueError("evaluation needs an eval_dataset")
        started = time.perf_counter()
        rank, world = self.args.process_index, self.args.world_size
        mine = [rows[i] for i in range(rank, len(rows), world)]
        sums = torch.zeros((len(self.args.teachers), 2), dtype=torch.float64)
        # Not compiled: its shapes are those of the questions.
        eager = torch.compiler.set_stance("force_eager")
        with in_step(self.model), self.accelerator.autocast(), eager:
            found = {}
            if mine:
                found = rationale_nll(
                    self.model,
                    mine,
                    self.args.teachers,
                    batch_tokens=self.args.eval_batch_tokens,
                    backend=self.choice.backend,
                ).teachers
        for k, name in enumerate(self.args.teachers):
            if name in found:
                one = found[name]
                sums[k] = torch.tensor([one.nll * one.rationales, one.rationales])
        total, count = self._total(sums.to(self.args.device)).T.tolist()
        metrics = {f"{metric_key_prefix}_nll": sum(total) / max(sum(count), 1)}
        for name, value, n in zip(self.args.teachers, total, count, strict=True):
            if n:
                metrics[f"{metric_key_prefix}/teacher/{name}/nll"] = value / n
        metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - started
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    # ---- logs and state ----------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the window's means to a training row."""
        if "loss" in logs:
            logs.update(self._window.rows(self.state.global_step, self._total))
        super().log(logs, start_time)
        for name in _CLOCK:
            self.state.log_history[-1].pop(name, None)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As CheckpointedTrainer.train; run.json then says how the run ended."""
        self._window.reset()
        set_seed(self.args.seed)  # what ran since the trainer was made must not matter
        try:
            with self._compiled():
                result = super().train(*args, **kwargs)
        except BaseException as error:
            self._display.close()
            lost = _lost_process(error, self.args)
            if self.is_world_process_zero():
                self.files.stopped(self.state.global_step, lost or error)
            if lost is not None:
                raise lost from error
            raise
        return result

    @contextmanager
    def _compiled(self) -> Iterator[None]:
        """Inside, the student's body is compiled where that was asked for."""
        if not self.args.compile_body:
            yield
            return
        body = causal_model(self.model).base_model
        body.compile(fullgraph=True)
        try:
            yield
        finally:
            body._compiled_call_impl = None

    def window_state(self) -> dict[str, Any]:
        """Adds the per-teacher sums."""
        return {**super().window_state(), "window": self._window.state()}

    def load_window_state(self, state: dict[str, Any]) -> None:
        """Takes up the per-teacher sums."""
        super().load_window_state(state)
        self._window.load(state["window"])


def _lost_process(error: BaseException, args: CompactTrainingArguments) -> RuntimeError | None:
    """What to say when a connection to another process broke; None for any other error."""
    text = str(error).lower()
    broken = ("connection closed by peer", "connection reset", "broken pipe", "socket closed")
    if args.world_size == 1 or not isinstance(error, RuntimeError):
        return None
    if not any(words in text for words in broken):
        return None
    return RuntimeError(
        f"process {args.process_index} of {args.world_size}: another process has ended, so this "
        "one stops too; look for that one's error, and start the same command again to resume"
    )
