"""Runs that survive: checkpoints whole or absent, resume from the newest good one, clean stops."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import platform
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import transformers
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from .._version import __version__
from ..atomic import (
    DamagedError,
    DiskFullError,
    atomic_directory,
    read_manifest,
    remove_directory,
    remove_leftovers,
    verify_directory,
)
from ..students import is_sharded
from .interrupts import StopSignals, TrainingInterrupted
from .sharding import WholeState, gather, split_optimizer_state

logger = logging.getLogger(__name__)
T = TypeVar("T")
_NAME = re.compile(r"checkpoint-(\d+)")
_WINDOW_FILE = "log_window_{rank}.json"


def list_checkpoints(run_dir: str | Path) -> dict[int, Path]:
    """Folders checkpoint-N of `run_dir` by step, ascending, good or damaged."""
    found = {}
    for path in Path(run_dir).glob("checkpoint-*"):
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def verify_checkpoint(path: str | Path) -> dict[str, Any]:
    """The manifest of a checkpoint every byte of which is as it was written.

    Raises DamagedError (a ValueError) naming what is wrong with it.
    """
    manifest = verify_directory(path)
    match = _NAME.fullmatch(Path(path).resolve().name)
    if match and manifest.get("step") != int(match[1]):
        raise DamagedError(f"{path}: its manifest is of step {manifest.get('step')}")
    return manifest


def find_checkpoint(run_dir: str | Path) -> Path | None:
    """The newest good checkpoint of `run_dir`, or None; every damaged one met is logged by name."""
    candidates = list_checkpoints(run_dir)
    for path in reversed(candidates.values()):
        try:
            manifest = verify_checkpoint(path)
        except DamagedError as error:
            logger.warning("damaged checkpoint, trying an older one: %s", error)
            continue
        if manifest.get("resumable"):
            return path
        logger.warning("%s holds no optimizer state (save_only_model), trying an older one", path)
    if candidates:
        logger.warning("%s: no good checkpoint, starting afresh", run_dir)
    return None


def rotate_checkpoints(run_dir: str | Path, limit: int | None, keep: Collection[Path]) -> None:
    """Delete checkpoints until `limit` are left: those never finished first, then the oldest.

    Those in `keep` stay whatever the limit. None or 0 deletes nothing.
    """
    if not limit:
        return
    found = list_checkpoints(run_dir)
    unfinished = [path for path in found.values() if not _finished(path)]
    order = unfinished + [path for path in found.values() if path not in unfinished]
    surplus = len(found) - limit
    for path in [path for path in order if path not in keep][: max(surplus, 0)]:
        remove_directory(path)


def _best_checkpoint(path: Path, run_dir: Path) -> list[Path]:
    """The checkpoint of `run_dir` that was the best so far when `path` was written, if any."""
    best = json.loads((path / TRAINER_STATE_NAME).read_text())["best_global_step"]
    return [run_dir / f"checkpoint-{best}"] if best else []


def _finished(path: Path) -> bool:
    try:
        read_manifest(path)
    except DamagedError:
        return False
    return True


class CheckpointedTrainer(Trainer):
    """A transformers.Trainer whose runs survive kills, full disks and damaged files.

    - A checkpoint is written to a temporary folder, flushed, given a manifest and renamed.
    - `train(resume_from_checkpoint=...)`: "auto" takes the newest good checkpoint of `output_dir`
      or starts afresh, True does the same but insists on one, a path must be good, None or False
      start afresh in a folder without checkpoints. ValueError says what is wrong.
    - SIGTERM or Ctrl-C ends the step, saves and raises TrainingInterrupted; twice kills.
    - A full disk raises DiskFullError; earlier checkpoints stay as they were.

    Several processes: all must call `train` and share the file system of `output_dir`. Every one
    writes its part into one temporary folder; the main process renames it when all are done.
    Every process then continues or raises together. A sharded model's state is gathered first,
    so that the files are those of any other run, and one run can go on in the manner of another.
    """

    _staging: Path | None = None
    _signals: StopSignals | None = None
    _last_written: int | None = None  # step of the checkpoint written last by this process
    _whole: WholeState | None = None  # of a sharded model, while a checkpoint is written

    def train(
        self,
        resume_from_checkpoint: str | Path | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        if self.args.save_on_each_node:
            raise ValueError(
                "save_on_each_node=True: checkpoints need one output_dir that all nodes share; "
                "leave save_on_each_node at False"
            )
        self._last_written = None
        resume = self._on_main(lambda: self._choose_checkpoint(resume_from_checkpoint))
        restore = _RestoreWindow(self, resume)
        self.add_callback(restore)
        try:
            with StopSignals() as self._signals:
                result = super().train(
                    resume_from_checkpoint=resume,
                    trial=trial,
                    ignore_keys_for_eval=ignore_keys_for_eval,
                )
                signum = self._stop_signal()
        finally:
            self.remove_callback(restore)
            self._signals = None
        if signum:
            newest = self._newest_whole()
            raise TrainingInterrupted(
                signum, self.state.global_step, newest.name if newest else None
            )
        return result

    def window_state(self) -> dict[str, Any]:
        """What has been added up since the last log row, as JSON values.

        A subclass with sums of its own adds them, so that a resumed run logs the same row.
        """
        return {"loss": self._tr_loss.item(), "last_logged": self._globalstep_last_logged}

    def load_window_state(self, state: dict[str, Any]) -> None:
        """Take up what `window_state` returned when the checkpoint was written."""
        self._tr_loss += state["loss"]
        self._globalstep_last_logged = state["last_logged"]
        # The mean loss at the end is of the steps of this process alone.
        self._total_loss_scalar -= state["loss"]

    def _choose_checkpoint(self, resume: str | Path | bool | None) -> str | None:
        run_dir = self._run_dir
        removed = remove_leftovers(run_dir)
        if removed:
            logger.warning("%s: removed what a killed run left: %s", run_dir, ", ".join(removed))
        if resume == "auto" or resume is True:
            chosen = find_checkpoint(run_dir)
            if chosen is None and resume is True:
                raise ValueError(f"{run_dir}: no good checkpoint to resume from")
        elif resume is None or resume is False:
            chosen = None
            self._refuse_newer_than(-1)
        else:
            chosen = Path(resume)
            manifest = verify_checkpoint(chosen)
            if not manifest.get("resumable"):
                raise ValueError(f"{chosen}: no optimizer state in it (save_only_model)")
            self._refuse_newer_than(manifest["step"])
        if chosen is not None:
            logger.info("resuming from %s", chosen)
        if chosen is not None and chosen.resolve().parent == run_dir.resolve():
            # A kill between the last save and its rotation left this to do.
            kept = {run_dir / chosen.name, *_best_checkpoint(chosen, run_dir)}
            rotate_checkpoints(run_dir, self.args.save_total_limit, kept)
        return str(chosen) if chosen else None

    def _refuse_newer_than(self, step: int) -> None:
        # Otherwise the next "auto" would go on from a checkpoint of that other run.
        newer = [path.name for n, path in list_checkpoints(self._run_dir).items() if n > step]
        if newer:
            raise ValueError(
                f"{self._run_dir} holds {', '.join(newer)} of an earlier run: resume with "
                '"auto", delete them, or choose another output_dir'
            )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        run_dir = Path(super()._get_output_dir(trial))
        final = run_dir / f"checkpoint-{step}"
        best = self.state.best_global_step
        best_path = run_dir / f"checkpoint-{best}" if best else None
        if best_path is not None and (best_path == final or best_path.is_dir()):
            self.state.best_model_checkpoint = str(best_path)
        record = {
            "step": step,
            "resumable": not self.args.save_only_model,
            "versions": {
                "compact_fast": __version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }
        try:
            self._write_whole(final, record, model, trial)
            self._last_written = step
        except DiskFullError as error:
            raise self._explain_full_disk(error, final) from error
        kept = {final, best_path} if best_path else {final}
        self._on_main(lambda: rotate_checkpoints(run_dir, self.args.save_total_limit, kept))
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(final))

    def _write_whole(self, final: Path, record: dict[str, Any], model: Any, trial: Any) -> None:
        best = self.state.best_global_step
        # All processes must meet for it: before one of them can fail.
        self._whole = gather(self.model, None if self.args.save_only_model else self.optimizer)
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, self, "_whole", None)
            self._staging = self._on_main(
                lambda: stack.enter_context(atomic_directory(final, record=record))
            )
            error: Exception | None = None
            try:
                # The host would look for the best checkpoint in the temporary folder, and make
                # all processes meet there even when one of them has failed.
                self.state.best_global_step = None
                super()._save_checkpoint(model, trial)
                self.state.best_global_step = best
                if self.args.should_save:
                    self.state.save_to_json(str(self._staging / TRAINER_STATE_NAME))
                name = _WINDOW_FILE.format(rank=self.args.process_index)
                (self._staging / name).write_text(json.dumps(self.window_state()))
            except Exception as raised:
                error = raised
            finally:
                self.state.best_global_step = best
                self._staging = None
            self._raise_together(error)
            # Only the main process has something to close: this is where the folder appears.
            self._on_main(stack.close)

    def _explain_full_disk(self, error: DiskFullError, final: Path) -> DiskFullError:
        newest = self._newest_whole()
        remains = f"{newest.name} is whole and would be resumed" if newest else "none before it"
        return DiskFullError(
            errno.ENOSPC,
            f"{error.strerror}, training stopped at step {self.state.global_step} ({remains})",
            str(final),
        )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As the host's; that of a sharded model reads and writes whole tensors."""
        fresh = self.optimizer is None
        optimizer: Any = super().create_optimizer(*args, **kwargs)
        if fresh and is_sharded(self.model):
            optimizer.register_load_state_dict_pre_hook(split_optimizer_state)
            optimizer.register_state_dict_post_hook(
                lambda _, state: state if self._whole is None else self._whole.optimizer
            )
        return optimizer

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        if state_dict is None and is_sharded(self.model):
            whole = self._whole or gather(self.model)  # all processes come here
            assert whole is not None
            state_dict = whole.weights
        super()._save(output_dir, state_dict)

    def _get_output_dir(self, trial: Any) -> str:
        if self._staging is not None:
            return str(self._staging.parent)
        return str(super()._get_output_dir(trial))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:  # else it is pushed under its final name
            super()._push_from_checkpoint(checkpoint_folder)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Resumed where max_steps falls inside an epoch, the host would do one step too many.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: Any, trial: Any, *args: Any, **kwargs: Any
    ) -> None:
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        signum = self._stop_signal()
        if signum:
            step = self.state.global_step
            if self._last_written != step:
                self._save_checkpoint(model, trial)
                self.control = self.callback_handler.on_save(self.args, self.state, self.control)
            raise TrainingInterrupted(signum, step, f"checkpoint-{step}")

    def _load_best_model(self) -> None:
        best = str(self.state.best_model_checkpoint)
        self._on_main(lambda: verify_checkpoint(best))
        super()._load_best_model()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # The host only warns, and would train on from whatever the student holds instead. A tied
        # weight is stored once and so "missing" under its other name.
        assert self.model is not None
        named = {
            **dict(self.model.named_parameters(remove_duplicate=False)),
            **dict(self.model.named_buffers(remove_duplicate=False)),
        }
        missing = set(load_result.missing_keys)
        loaded = {id(value) for name, value in named.items() if name not in missing}
        missing = {name for name in missing if id(named.get(name)) not in loaded}
        strange = [*sorted(missing), *load_result.unexpected_keys]
        if strange:
            raise ValueError(
                f"the checkpoint is of another student: {len(missing)} weights of this one are "
                f"not in it, {len(load_result.unexpected_keys)} in it are not of this one, first "
                f"{strange[0]!r}; resume with the student it was made with, or choose another "
                "output_dir"
            )

    @property
    def _run_dir(self) -> Path:
        return Path(str(self.args.output_dir))

    def _newest_whole(self) -> Path | None:
        found = list_checkpoints(self._run_dir).values()
        return next((path for path in reversed(found) if _finished(path)), None)

    def _stop_signal(self) -> int:
        """The signal that any of the processes has received, 0 if none; all see the same."""
        received = self._signals.received if self._signals else 0
        if dist.is_available() and dist.is_initialized():
            shared = torch.tensor(received, device=self.args.device)
            dist.all_reduce(shared, op=dist.ReduceOp.MAX)
            received = int(shared.item())
        return received

    def _on_main(self, work: Callable[[], T]) -> T:
        """Do `work` on the main process; every process returns its result or raises its error."""
        outcome: list[Any] = [None, None]
        if self.is_world_process_zero():
            try:
                outcome[0] = work()
            except Exception as error:
                outcome[1] = error
        if dist.is_available() and dist.is_initialized():
            dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]  # type: ignore[no-any-return]

    def _raise_together(self, error: Exception | None) -> None:
        """Raise on every process if any has failed: its own error, or that of the first other."""
        errors = [error]
        if dist.is_available() and dist.is_initialized():
            errors = [None] * dist.get_world_size()
            dist.all_gather_object(errors, error)
        first = error or next((other for other in errors if other is not None), None)
        if first is not None:
            raise first


class _RestoreWindow(TrainerCallback):
    """Gives the trainer its log window back, after the host has reset it and before a step."""

    def __init__(self, trainer: CheckpointedTrainer, checkpoint: str | None) -> None:
        self._trainer, self._checkpoint = trainer, checkpoint

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._checkpoint is None:
            return
        path = Path(self._checkpoint) / _WINDOW_FILE.format(rank=args.process_index)
        if path.is_file():  # absent where another number of processes goes on
            self._trainer.load_window_state(json.loads(path.read_text()))
