"""The training loop, to be read from `train` downwards: forward, loss, backward, clip, update, log, save.

A step takes `rows_per_step` rows. They are cut into passes, as few as memory allows, shared out among the processes,
and every pass adds its part of the gradient of one sum over the step's response tokens, divided once by their number.
So 1 x 16, 4 x 4 and 2 processes x 8 rows give the same gradients.

accelerate wraps the student (DDP, FSDP2), skips the syncs between passes and clips. Checkpoints are our own:
accelerate's would hold the whole frozen student under FSDP2.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import get_scheduler

from src.distillation.base import head_device, response_hidden, send
from src.distillation.batching import Cutting, Pair, StepOrder, TrainingData
from src.distillation.gpu import memory_of, tokens_that_fit
from src.distillation.heldout import SCORED_TOKENS, Arm, score_heldout, summarise
from src.distillation.kd_config import KDConfig
from src.distillation.lora import adapters_cast
from src.distillation.losses import LossSums, TopK, kd_loss
from src.distillation.packing import batch_of
from src.distillation.run_folder import peak_memory_mb, remove_old_checkpoints, write_checkpoint
from src.distillation.teacher import Reader
from src.utils.common import Progress, UserError, append_jsonl, logger, read_json, write_json

STATE = "training_state.json"  # in a checkpoint: the step, and how the steps were cut


@dataclass(frozen=True)
class OwnRows:
    """A round's answers of the student itself, and what the teacher believes of them.

    round: its number, from 1.
    first_step: the step (0, 1, ...) that takes `by_step[0]`, the next takes `by_step[1]`, ...
    teacher: reads them; None where that is the run's resident teacher.
    """

    round: int
    first_step: int
    by_step: list[list[Pair]]
    teacher: Reader | None

    def all(self) -> list[Pair]:
        return [pair for rows in self.by_step for pair in rows]


@dataclass
class Run:
    """What a run trains with.

    model: the student with its adapters; `wrapped` is the same as DDP or FSDP2 see it.
    student: the same as a reader, to be measured.
    teacher: what it learns from.
    learning_rate: of step 0, 1, ...
    compiled: the loss kernel is.
    took_effect: what was decided where a setting leaves it open.
    steps: all of them; `step` are taken, and `train` stops when `end` are.
    own: the student's own answers, where this part of the run is a round.
    """

    config: KDConfig
    accelerator: Accelerator
    data: TrainingData
    model: PeftModel
    wrapped: nn.Module
    optimizer: Optimizer
    learning_rate: Callable[[int], float]
    student: Reader
    teacher: Reader
    pad_id: int
    compiled: bool
    took_effect: dict[str, Any]
    order: StepOrder
    cutting: Cutting
    steps: int
    end: int
    own: OwnRows | None = None
    step: int = 0


@dataclass(frozen=True)
class StepFacts:
    """Of one step on this rank.

    sums: loss, kd and ce, each over the step's tokens, `[3]` on the device; in a round also kd summed over the tokens
        of the student's own rows, and the number of these, `[5]`.
    grad_norm: before clipping.
    tokens: that were read.
    """

    sums: Tensor
    grad_norm: Tensor
    tokens: int


def train(run: Run, folder: Path) -> None:
    """Take the steps that are left up to `run.end`, into `folder`: metrics.jsonl and checkpoints.

    Raises:
        UserError: a loss or a weight is not a number, or not even one row fits into memory.
    """
    config, main = run.config, run.accelerator.is_main_process
    run.model.train()  # dropout on; whoever measures turns it off for as long as it reads
    window = Window()
    with contextlib.ExitStack() as stack:
        progress = None
        if main:
            progress = stack.enter_context(Progress(run.steps, f"training {folder.name}", "step"))
            progress.skip(run.step)  # a resumed run's bar begins where the run was left
        while run.step < run.end:
            # 1. forward, loss, backward of all passes; clip; update
            with window.measuring():
                window.facts.append(take_step(run))
            lr = run.learning_rate(run.step)  # the one that this step was taken with
            run.step += 1  # from here on: steps that are taken

            # 2. log; also whenever the loop stops to measure or save, so that nothing is lost with a kill after it
            last = run.step == run.steps
            measures = bool(run.data.validation) and _due(config.eval_steps, run.step, last)
            # the student that answers for the next round is read from its checkpoint
            saves = _due(config.save_steps, run.step, last) or (run.step == run.end and not last)
            if measures or saves or _due(config.logging_steps, run.step, last):
                row = _write_window(run, folder, window, lr)
                window = Window()
                if progress:
                    progress.say(
                        loss=f"{row['loss']:.4f}",
                        kd=f"{row['kd_loss']:.4f}",
                        tokens_per_second=f"{row['tokens_per_second']:.0f}",
                    )

            # 3. measure on the validation rows, on which learning rate, T and alpha are chosen
            if measures:
                scored = summarise(score(run, run.data.validation, {"student": contextlib.nullcontext}))
                named = {f"validation_{name}": value for name, value in scored.items()}
                _write_row(run, folder, {"step": run.step, **named})

            # 4. save; a killed run goes on from here: bit for bit on a CPU, on a GPU but for the order of atomic sums
            if saves:
                _refuse_broken_weights(run, folder)
                write_checkpoint(folder, run.step, run.accelerator, lambda path: save_state(run, path))
                if main:
                    remove_old_checkpoints(folder, config.save_total_limit)
            if progress:
                progress.advance()


def _due(every: int, step: int, last: bool) -> bool:
    return every > 0 and (step % every == 0 or last)  # 0: never, not after the last step either


def take_step(run: Run) -> StepFacts:
    """One optimisation step."""
    # 1. the rows of the step, the same on every rank
    rows = rows_of_step(run)

    # 2. forward, loss and backward of all passes
    sums, read = passes_within_memory(run, rows)

    # 3. clip
    limit = run.config.max_grad_norm or math.inf  # the norm is logged in any case
    grad_norm = run.accelerator.clip_grad_norm_(run.wrapped.parameters(), limit)

    # 4. update
    # a function of the step alone: no scheduler whose state a checkpoint would have to keep
    for group in run.optimizer.param_groups:
        group["lr"] = run.learning_rate(run.step)
    run.optimizer.step()
    run.optimizer.zero_grad()
    return StepFacts(sums, grad_norm, read)


def rows_of_step(run: Run) -> list[Pair]:
    """The rows that the next step takes; in a round the last of them are the student's own answers.

    A step has as many rows as ever: where an answer cannot be learned from, a teacher's row keeps its place.
    """
    rows = [run.data.train[index] for index in run.order.rows_of(run.step)]
    if run.own is None:
        return rows
    own = run.own.by_step[run.step - run.own.first_step]
    # not rows[:-len(own)], which is empty where no answer is left to learn from
    return rows[: len(rows) - len(own)] + own


def run_passes(run: Run, rows: list[Pair]) -> tuple[Tensor, int]:
    """This rank's share of a step's gradient, added up in the adapters; its sums (see `StepFacts`), and the tokens
    read."""
    accelerator, ranks = run.accelerator, run.accelerator.num_processes
    passes = run.cutting.passes([len(row.student) for row in rows])
    # rank 1 of 2 takes passes 1, 3, 5, ...
    mine = passes[accelerator.process_index :: ranks]
    # one divisor for all passes: a mean of means would give a token in a short answer more weight than one in a long;
    # DDP and FSDP average over ranks what should be added up, so each divides by its share of the step's tokens
    tokens = sum(len(row.student.response_ids) for row in rows) / ranks
    sums = torch.zeros(5 if run.own else 3, device=accelerator.device)  # see `StepFacts`
    # the adapters change in the update alone, so that one copy of them in bf16 serves all passes
    with adapters_cast(run.model, run.config.dtype):
        for number, part in enumerate(mine):
            last = number == len(mine) - 1  # ranks exchange gradients once a step, in the last backward pass
            with contextlib.nullcontext() if last else accelerator.no_sync(run.wrapped):
                taken = [rows[index] for index in part]
                found = pass_loss(run, taken)
                loss = found.loss / tokens
                accelerator.backward(loss)
            # means over the step's tokens, of which these are this pass's share
            parts = [loss.detach(), found.kd / tokens, found.ce / tokens]
            if run.own:
                # not divided: a step may have few own tokens or none, so the log divides a window's sum by its number
                own_tokens = sum(len(row.student.response_ids) for row in taken if row.own)
                parts += [found.own_kd, torch.full_like(found.own_kd, own_tokens)]
            # stays on the device: asking for a value would wait for the GPU
            sums += torch.stack(parts).to(sums.device)
    return sums, sum(len(rows[index].student) for part in mine for index in part)


def passes_within_memory(run: Run, rows: list[Pair]) -> tuple[Tensor, int]:
    """`run_passes`; where memory runs out, again in smaller passes, which the run then keeps.

    Raises:
        UserError: passes cannot be cut further, or other processes wait for this one.
    """
    while True:
        # so that a step that is taken again draws the masks that it would have drawn at once
        states = _random_states() if run.config.lora_dropout else {}  # nothing else draws
        try:
            return run_passes(run, rows)
        except torch.OutOfMemoryError as error:
            smaller = _smaller(run.cutting, [len(row.student) for row in rows])
            # other ranks wait in a collective call that this one will not join
            if smaller is None or run.accelerator.num_processes > 1:
                raise UserError(
                    f"step {run.step + 1}: out of GPU memory; lower --tokens_per_batch (or --batch_size, with as much "
                    "more --gradient_accumulation_steps: the same run goes on), pass --gradient_checkpointing, lower "
                    "--max_length, or name more devices"
                ) from error
        # not before here: the error's traceback holds what the pass had made
        run.optimizer.zero_grad()  # some passes have left their part
        torch.cuda.empty_cache()  # blocks of the old sizes would be in the way
        if states:
            _set_random_states(states)
        run.cutting = smaller
        size = f"{smaller.tokens} tokens" if smaller.tokens else f"a {smaller.parts}th of the rows"
        logger.warning("step %d: out of GPU memory; going on with passes of %s", run.step + 1, size)


def _smaller(cutting: Cutting, lengths: list[int]) -> Cutting | None:
    """Half of what the largest pass of several rows holds; None where each is one row already."""
    passes = [part for part in cutting.passes(lengths) if len(part) > 1]
    # one row a pass is the least there is
    if not passes:
        return None
    # padded rows are cut by their number: twice as many passes
    if not cutting.packing:
        return replace(cutting, parts=min(2 * cutting.parts, len(lengths)))
    # passes of 4,000 and 3,600 tokens -> at most 2,000
    return replace(cutting, tokens=max(sum(lengths[index] for index in part) for part in passes) // 2)


class Beliefs(NamedTuple):
    """The teacher's hidden states at some rows' response positions and its head, or its top k; or nothing."""

    states: Tensor | TopK | None = None
    head: Tensor | None = None


class PassSums(NamedTuple):
    """`LossSums` of a pass, and the part of `kd` that is the student's own rows'."""

    loss: Tensor
    kd: Tensor
    ce: Tensor
    own_kd: Tensor


def pass_loss(run: Run, rows: list[Pair]) -> PassSums:
    """The objective's sums over the response tokens of some rows."""
    device = head_device(run.model)
    batch = batch_of([row.student for row in rows], run.pad_id, run.config.packing)
    teachers, own = [row for row in rows if not row.own], [row for row in rows if row.own]

    def inside() -> PassSums:
        with autocast(run):
            # what the teacher believes comes first: copies wait for no forward pass, and a resident teacher's
            # activations are gone before the student's are made
            beliefs = _beliefs(run, run.teacher, teachers, device)
            own_beliefs = _beliefs(run, (run.own and run.own.teacher) or run.teacher, own, device)
            # the body alone: logits are formed in the loss, a chunk of tokens at a time
            hidden, labels = response_hidden(run.model, batch)  # [N, H] and [N], N response tokens
            if not own:
                found = _objective(run, hidden, labels, beliefs, run.config.alpha)
                return PassSums(*found, torch.zeros_like(found.kd))
            return _mixed_loss(run, rows, hidden, labels, beliefs, own_beliefs)

    # through the wrapper: DDP and FSDP would not see a call of the body, and ranks would drift apart without an error
    return call_inside(run.wrapped, run.model, inside)


def _mixed_loss(
    run: Run, rows: list[Pair], hidden: Tensor, labels: Tensor, beliefs: Beliefs, own_beliefs: Beliefs
) -> PassSums:
    """The sums of a pass with rows of both kinds: alpha * T^2 * D of all tokens, (1 - alpha) * CE of the teacher's.

    With alpha = 1 and lambda the share of own rows this is GKD's objective (Agarwal et al. 2024, algorithm 1); below 1
    the teacher's rows have their cross-entropy beside it. With reverse KL the own rows' part is MiniLLM's direction (Gu
    et al. 2024, equation 1), without its gradient through the sampling: the answers are given, as they are in GKD.
    """
    # 1. which tokens are of own rows: rows (own, not own) of 2 and 3 tokens -> T T F F F; on the CPU, nothing waits
    counts = torch.tensor([len(row.student.response_ids) for row in rows])
    is_own = torch.tensor([row.own for row in rows]).repeat_interleave(counts)  # [N]
    # 2. own rows: the divergence alone, of weight 1 here, times alpha as everywhere
    own_places = send(is_own.nonzero()[:, 0], labels.device)
    found = _objective(run, hidden.index_select(0, own_places), labels[own_places], own_beliefs, alpha=1.0)
    loss, kd, ce = run.config.alpha * found.loss, found.kd, torch.zeros_like(found.ce)
    # 3. the teacher's rows: both terms; a pass may have own rows only
    if not is_own.all():
        places = send((~is_own).nonzero()[:, 0], labels.device)
        theirs = _objective(run, hidden.index_select(0, places), labels[places], beliefs, run.config.alpha)
        loss, kd, ce = loss + theirs.loss, kd + theirs.kd, theirs.ce
    return PassSums(loss, kd, ce, found.kd)


def _objective(run: Run, hidden: Tensor, labels: Tensor, beliefs: Beliefs, alpha: float) -> LossSums:
    """`kd_loss` of some positions, as the run is set."""
    config = run.config
    return kd_loss(
        hidden,
        run.student.head_on(labels.device),
        beliefs.states,
        beliefs.head,
        labels,
        temperature=config.temperature,
        alpha=alpha,
        kind=config.divergence,
        beta=config.beta,
        student_map=run.student.logit_map,
        teacher_map=run.teacher.logit_map,
        compiled=run.compiled,
        teacher_temperature=config.teacher_temperature,
        teacher_top_k=config.teacher_top_k,
        teacher_top_p=config.teacher_top_p,
        vocab_size=run.student.vocab_size,
    )


def _beliefs(run: Run, teacher: Reader, rows: list[Pair], device: torch.device) -> Beliefs:
    """What the teacher believes of some rows, as `teacher` has read them; with alpha = 0 nobody asks it."""
    if run.config.alpha == 0 or not rows:
        return Beliefs()
    theirs = [row.teacher for row in rows]
    if teacher.topk is not None:
        return Beliefs(TopK(*(send(tensor, device) for tensor in teacher.topk(theirs))))
    return Beliefs(send(teacher.hidden(theirs), device), run.teacher.head_on(device))  # one teacher: one head for all


def probe_gradients(run: Run, rows: list[Pair] | None = None) -> list[Tensor]:
    """The adapters' gradients on some rows (default: the two shortest), which leave no trace."""
    rows = rows or sorted(run.data.train, key=lambda pair: len(pair.student))[:2]
    run.model.train()
    try:
        pass_loss(run, rows).loss.backward()
        return [parameter.grad.clone() for parameter in run.model.parameters() if parameter.grad is not None]
    finally:  # also where memory ran out half way
        run.optimizer.zero_grad()


def measured_tokens(run: Run) -> int:
    """What a pass may hold on this run's GPUs, the least of all ranks; as batch_size says where that cannot be told.

    The optimiser's two moments are not there yet when it is measured, and gradients only from the first backward on.
    """
    memory = memory_of(run.model)
    if memory is None:
        return 0
    trainable = sum(_own_part(parameter).numel() for parameter in run.model.parameters() if parameter.requires_grad)
    lengths = [len(pair.student) for pair in run.data.train]

    def work(rows: list[int]) -> None:
        probe_gradients(run, [run.data.train[index] for index in rows])

    # reserved: a gradient and AdamW's two moments, 4 bytes each
    tokens = tokens_that_fit(lengths, work, memory, reserved=3 * 4 * trainable) or 0
    # every rank must cut a step alike; the 0 of one that cannot tell wins
    return int(run.accelerator.gather(torch.tensor([tokens], device=run.accelerator.device)).min())


def autocast(run: Run) -> torch.autocast:
    """Products in bf16 where the run has it."""
    return torch.autocast(run.accelerator.device.type, torch.bfloat16, enabled=run.config.bf16)


def call_inside(wrapped: nn.Module, model: nn.Module, function: Callable[[], Any]) -> Any:
    """Run `function` as the forward of a wrapped model, so that DDP and FSDP see their forward and sync gradients.

    What it needs it brings along: arguments of the forward would be cast to bf16 by FSDP's mixed precision.
    """
    model.forward = lambda _: function()  # the instance's own hides the class's; every wrapper ends in a call of it
    try:
        return wrapped(None)  # on GPUs DDP wants an argument
    finally:
        del model.forward


def score(run: Run, pairs: list[Pair], arms: dict[str, Arm], progress: Progress | None = None) -> list[dict[str, Any]]:
    """`score_heldout` of these rows, in the precision of training and inside the wrapped model's forward."""
    rows: list[dict[str, Any]] = []

    def inside() -> None:
        with autocast(run):
            for part in score_heldout(run.student, run.teacher, pairs, arms, run.cutting.tokens or SCORED_TOKENS):
                rows.extend(part)
                if progress:
                    progress.advance(len(part) // len(arms))  # a row comes once for every arm

    call_inside(run.wrapped, run.model, inside)
    return rows


@dataclass
class Window:
    """What the steps since the last row of the log have in common."""

    facts: list[StepFacts] = field(default_factory=list)
    seconds: float = 0.0

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds += time.monotonic() - started

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over steps, the last norm, and the speed over all ranks; here alone the device is waited for.

        `on_policy_kd_loss` is the mean over the tokens of own rows, and is left out where no step had such a row.
        """
        with self.measuring():
            # [3] or [5], of all ranks and steps
            sums = accelerator.reduce(torch.stack([facts.sums for facts in self.facts]).sum(0))
            tokens = torch.tensor(sum(facts.tokens for facts in self.facts), device=accelerator.device)
            tokens = accelerator.reduce(tokens).item()
            # a rank divides by its share of a step's tokens (see `run_passes`), so a step's mean is the mean over ranks
            loss, kd, ce = (sums[:3] / (accelerator.num_processes * len(self.facts))).tolist()
            own_kd, own_tokens = sums[3:].tolist() if len(sums) > 3 else (0.0, 0.0)
            norm = self.facts[-1].grad_norm
            grad_norm = norm.item() if isinstance(norm, Tensor) else norm
        return {
            "loss": loss,
            "grad_norm": grad_norm,
            "kd_loss": kd,
            "ce_loss": ce,
            **({"on_policy_kd_loss": own_kd / own_tokens} if own_tokens else {}),
            "tokens": tokens,
            "tokens_per_second": tokens / self.seconds,
            "peak_memory_mb": peak_memory_mb(),
        }


def _write_window(run: Run, folder: Path, window: Window, lr: float) -> dict[str, Any]:
    """One row of the log, which it returns."""
    row = {"step": run.step, **window.means(run.accelerator), "lr": lr}
    if run.own:
        row["round"] = run.own.round
    _refuse_nan(row, folder)
    _write_row(run, folder, row)
    return row


def _write_row(run: Run, folder: Path, row: dict[str, Any]) -> None:
    if run.accelerator.is_main_process:
        append_jsonl(folder / "metrics.jsonl", [row])
    run.accelerator.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])


def _refuse_nan(row: dict[str, Any], folder: Path) -> None:
    for name in ("loss", "grad_norm"):
        if not math.isfinite(row[name]):
            raise UserError(
                f"{folder}: step {row['step']}: {name} is {row[name]}; lower --learning_rate or raise "
                "--warmup_steps (checkpoints up to here are kept)"
            )


def _own_part(parameter: Tensor) -> Tensor:
    """What this rank has of a parameter: all of it, or its shard."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _refuse_broken_weights(run: Run, folder: Path) -> None:
    """A step between two rows of the log may have broken them: such a checkpoint must not be gone on from."""
    for name, parameter in run.model.named_parameters():
        if parameter.requires_grad and not _own_part(parameter).isfinite().all():
            raise UserError(
                f"{folder}: step {run.step}: {name} is not a number; lower --learning_rate or raise "
                "--warmup_steps (checkpoints before this one are kept)"
            )


def make_optimizer(config: KDConfig, model: nn.Module) -> Optimizer:
    """Of the adapters, which all decay."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.optim == "sgd":
        return torch.optim.SGD(parameters, config.learning_rate, weight_decay=config.weight_decay)
    return torch.optim.AdamW(
        parameters,
        config.learning_rate,
        (config.adam_beta1, config.adam_beta2),
        config.adam_epsilon,
        config.weight_decay,
        fused=config.optim == "adamw_torch_fused",
    )


def make_learning_rate(config: KDConfig, steps: int) -> Callable[[int], float]:
    """The schedule as a function of the step alone, so that a resumed run needs nothing to go on with it."""
    # transformers makes a scheduler of an optimiser; all that is wanted of it is step -> factor
    unused = torch.optim.SGD([torch.zeros(1)], config.learning_rate)
    [factor] = get_scheduler(config.lr_scheduler_type, unused, config.warmup_steps, steps).lr_lambdas  # a group each
    return lambda step: config.learning_rate * factor(step)


# A checkpoint is adapter_model.safetensors with its config, optimizer.pt, rng_<rank>.safetensors and STATE.

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)  # also where it is sharded


def save_adapter(run: Run, folder: Path) -> None:
    """As peft reads it, put together where ranks share it (all ranks must call)."""
    weights = {}
    for name, parameter in run.model.named_parameters():
        if parameter.requires_grad:
            own = parameter.detach()
            weights[name] = own.full_tensor() if isinstance(own, DTensor) else own
    if run.accelerator.is_main_process:
        run.model.save_pretrained(folder, state_dict=weights)


def load_adapter(model: PeftModel, folder: Path) -> None:
    """Before the model is wrapped: sharded weights could not take it."""
    set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))


def save_state(run: Run, folder: Path) -> None:
    """This rank's part of a checkpoint."""
    save_adapter(run, folder)
    # put together where it is sharded, so that all ranks must call
    optimizer = get_optimizer_state_dict(run.wrapped, _plain(run.optimizer), options=WHOLE)
    save_file(_random_states(), folder / f"rng_{run.accelerator.process_index}.safetensors")
    if run.accelerator.is_main_process:
        torch.save(optimizer, folder / "optimizer.pt")
        write_json(folder / STATE, {"step": run.step, "steps": run.steps, "cutting": asdict(run.cutting),
                                    "asked": asked_cutting(run.config)})  # fmt: skip


def asked_cutting(config: KDConfig) -> list[Any]:
    """The settings that a cutting follows from; while they stay, a run goes on with the passes that it had."""
    return [config.packing, config.tokens_per_batch, config.gradient_accumulation_steps]


def load_state(run: Run, folder: Path) -> None:
    """Go on where a checkpoint was written; the adapters were loaded before the model was wrapped."""
    run.step = read_json(folder / STATE)["step"]
    stored = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    if stored["state"]:  # SGD has none
        set_optimizer_state_dict(run.wrapped, _plain(run.optimizer), stored, options=WHOLE)
    random_states = folder / f"rng_{run.accelerator.process_index}.safetensors"
    if random_states.is_file():
        _set_random_states(load_file(random_states))
    else:
        logger.warning("%s is not there (more processes than before): dropout draws from the seed", random_states)


def _plain(optimizer: Optimizer) -> Optimizer:
    """The optimiser inside accelerate's."""
    return getattr(optimizer, "optimizer", optimizer)


def _random_states() -> dict[str, Tensor]:
    """Of the generators that dropout draws from."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        # zeros before the number: names sort as the GPUs do
        states |= {f"cuda_{index:03d}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _set_random_states(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    devices = [states[name] for name in sorted(states) if name != "cpu"]
    if torch.cuda.is_available() and len(devices) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(devices)
    elif devices or torch.cuda.is_available():
        logger.warning(
            "the checkpoint has random states of %d GPUs, here are %d: dropout draws from the seed",
            len(devices),
            torch.cuda.device_count(),
        )
