"""Speed and memory of a student's loss step: sparse targets against dense targets and against
cross-entropy.

    python benchmarks/loss.py [--quick] [--json PATH]

A step computes values, and gradients of hidden states and LM head. Times are taken in alternating
rounds in one process; on a CPU the peak memory of each step is taken from /proc in a process of its
own. The benchmark needs torch and `students/losses/` alone, and runs unchanged on a GPU; Liger's
kernels are measured if both a GPU and Liger are there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy, kl_div, linear

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from students.losses.distillation import distillation_loss
from students.losses.divergences import (
    CrossEntropy,
    DistributionLoss,
    ForwardKL,
    JensenShannon,
    ReverseKL,
)
from students.losses.inputs import Targets

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
HIDDEN = 2048 if CUDA else 64
"""Small on a CPU, so that the matrix products do not hide what the losses cost."""
ENTRIES = 50
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """Sizes of one step."""

    positions: int
    vocabulary: int
    rounds: int

    @property
    def name(self) -> str:
        return f"{self.positions:,} x {self.vocabulary:,}"


TINY = Case(8, 512, 1)
QUICK = (Case(512, 16_384, 3),)
FULL = (Case(4_096, 4_096, 7), Case(4_096, 32_768, 7), Case(4_096, 151_936, 5))

FORWARD_KL = ForwardKL(name="forward_kl", weight=1.0)
CROSS_ENTROPY = CrossEntropy(name="cross_entropy", weight=1.0)
LIST = (
    FORWARD_KL,
    CROSS_ENTROPY,
    ReverseKL(name="reverse_kl", weight=1.0, temperature=2.0, min_tail=1e-4),
    JensenShannon(name="jensen_shannon", weight=1.0, beta=0.5),
)
Step = Callable[[], torch.Tensor]


class Inputs:
    """The tensors of a case. Large ones are filled in place, so that making them has no peak."""

    def __init__(self, case: Case, *, dense: bool) -> None:
        torch.manual_seed(0)
        self.hidden = self._normal(case.positions, HIDDEN).requires_grad_()
        self.lm_head = self._normal(case.vocabulary, HIDDEN).requires_grad_()
        self.gold = torch.randint(0, case.vocabulary, (case.positions,), device=DEVICE)
        self.teacher_hidden = self._normal(case.positions, HIDDEN)
        self.teacher_logprobs = None
        if dense:
            self.teacher_logprobs = self._normal(case.positions, case.vocabulary)
            for row in self.teacher_logprobs.split(64):
                row.copy_(torch.log_softmax(row.float(), -1))
        self._case = case

    def targets(self, num_teachers: int) -> Targets:
        """`ENTRIES` different ids per position and teacher, half of them shared by neighbours."""
        case, shape = self._case, (num_teachers, self._case.positions, ENTRIES)
        first = torch.randint(0, case.vocabulary, (1, case.positions, 1), device=DEVICE)
        offset = torch.arange(num_teachers, device=DEVICE)[:, None, None] * (ENTRIES // 2)
        ids = (first + offset + torch.arange(ENTRIES, device=DEVICE)) % case.vocabulary
        logprobs = torch.log_softmax(2 * torch.randn(shape, device=DEVICE), -1) - 0.05
        tail = 1 - logprobs.exp().sum(-1)
        weights = torch.full(shape[:2], 1 / num_teachers, device=DEVICE)
        return Targets(self.gold, ids.int(), logprobs.half(), tail.half(), weights)

    def _normal(self, rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=DTYPE, device=DEVICE).normal_(0, HIDDEN**-0.25)


def ours(*losses: DistributionLoss, num_teachers: int = 1) -> Callable[[Inputs], Step]:
    def prepare(x: Inputs) -> Step:
        targets = x.targets(num_teachers)
        return lambda: distillation_loss(x.hidden, x.lm_head, None, targets, losses).total

    return prepare


def dense_kl(x: Inputs) -> Step:
    """KL from full logits, given the teacher's full log-probabilities, which are not counted."""

    def step() -> torch.Tensor:
        logprobs = torch.log_softmax(linear(x.hidden, x.lm_head).float(), -1)
        return kl_div(logprobs, x.teacher_logprobs, log_target=True, reduction="sum")

    return step


def dense_cross_entropy(x: Inputs) -> Step:
    return lambda: cross_entropy(linear(x.hidden, x.lm_head).float(), x.gold, reduction="sum")


def liger_cross_entropy(x: Inputs) -> Step:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    function = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda: function(x.lm_head, x.hidden, x.gold)


def liger_jsd(x: Inputs) -> Step:
    """Liger's distillation loss, which runs the teacher's LM head too; a beta of 0.5 is plain
    Jensen-Shannon.
    """
    from liger_kernel.transformers import LigerFusedLinearJSD

    function, teacher_lm_head = LigerFusedLinearJSD(jsd_beta=0.5), x.lm_head.detach().clone()
    return lambda: function(x.hidden, x.lm_head, x.teacher_hidden, teacher_lm_head, x.gold)


METHODS: dict[str, Callable[[Inputs], Step]] = {
    "cross_entropy": ours(CROSS_ENTROPY),
    "sparse_kl": ours(FORWARD_KL),
    "sparse_kl_2_teachers": ours(FORWARD_KL, num_teachers=2),
    "four_losses_2_teachers": ours(*LIST, num_teachers=2),
    "dense_kl": dense_kl,
    "dense_cross_entropy": dense_cross_entropy,
}
LIGER = {"liger_cross_entropy": liger_cross_entropy, "liger_jsd": liger_jsd}


def available() -> tuple[dict[str, Callable[[Inputs], Step]], list[str]]:
    """The methods that can run here, and why others cannot."""
    if not CUDA:
        return METHODS, ["skipped: Liger's kernels, which need a GPU"]
    if find_spec("liger_kernel") is None:
        return METHODS, ["skipped: Liger's kernels (pip install liger-kernel)"]
    return METHODS | LIGER, []


def run_step(step: Step, x: Inputs) -> float:
    """Seconds of values and gradients."""
    x.hidden.grad = x.lm_head.grad = None
    synchronise()
    started = time.perf_counter()
    step().backward()
    synchronise()
    return time.perf_counter() - started


def synchronise() -> None:
    if CUDA:
        torch.cuda.synchronize()


def measure_times(case: Case, methods: dict[str, Callable[[Inputs], Step]]) -> dict:
    """Seconds by method; the order turns from round to round, and the first round is dropped."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    x = Inputs(case, dense=True)
    steps = {name: prepare(x) for name, prepare in methods.items()}
    for turn in range(case.rounds + 1):
        order = list(steps) if turn % 2 else list(reversed(steps))
        for name in order:
            taken = run_step(steps[name], x)
            if turn:
                seconds[name].append(taken)
    return seconds


def peak_of_step(case: Case, method: str) -> float:
    """Peak memory in bytes that a step adds to its inputs, in this fresh process."""
    prepare = {**METHODS, **LIGER}[method]
    warm = Inputs(TINY, dense=True)
    run_step(prepare(warm), warm)
    x = Inputs(case, dense=method == "dense_kl")
    step = prepare(x)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run_step(step, x)
        return torch.cuda.max_memory_allocated() - before
    before = proc_bytes("VmRSS")
    run_step(step, x)
    return proc_bytes("VmHWM") - before


def proc_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def measure_peak(case: Case, method: str) -> float:
    """`peak_of_step` in a fresh process."""
    arguments = [sys.executable, __file__, "--child", json.dumps([asdict(case), method])]
    return float(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout)


def rows_of(case: Case, methods: dict[str, Callable[[Inputs], Step]]) -> list[dict]:
    peaks = {name: measure_peak(case, name) for name in methods}
    seconds = measure_times(case, methods)
    return [
        {
            "case": case.name,
            "positions": case.positions,
            "vocabulary": case.vocabulary,
            "hidden": HIDDEN,
            "method": name,
            "seconds": seconds[name],
            "median_seconds": statistics.median(seconds[name]),
            "tokens_per_second": case.positions / statistics.median(seconds[name]),
            "peak_memory_bytes": peaks[name],
        }
        for name in methods
    ]


def ratios_of(rows: list[dict]) -> dict[str, float]:
    """Ratios of the last, largest case; times as the median of the rounds' ratios."""
    last = {row["method"]: row for row in rows if row["case"] == rows[-1]["case"]}
    ce, sparse, dense = (last[name] for name in ("cross_entropy", "sparse_kl", "dense_kl"))
    rounds = zip(ce["seconds"], sparse["seconds"], strict=True)
    return {
        "sparse_over_ce_tokens_per_second": statistics.median(a / b for a, b in rounds),
        "sparse_over_ce_peak_memory": sparse["peak_memory_bytes"] / ce["peak_memory_bytes"],
        "dense_over_sparse_peak_memory": dense["peak_memory_bytes"] / sparse["peak_memory_bytes"],
    }


def table(rows: list[dict]) -> str:
    cells = [["tokens x vocabulary", "step", "seconds", "lowest-highest", "tokens/s", "peak MiB"]]
    for row in rows:
        low, high = min(row["seconds"]), max(row["seconds"])
        cells.append(
            [
                row["case"],
                row["method"],
                f"{row['median_seconds']:.4f}",
                f"{low:.4f}-{high:.4f}",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['peak_memory_bytes'] / MIB:,.0f}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    )


def machine() -> dict:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        cpu = names[0].split(":")[1].strip() if names else cpu
    return {
        "device": torch.cuda.get_device_name() if CUDA else cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "dtype": str(DTYPE).removeprefix("torch."),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def commit() -> str | None:
    """Commit of the measured code, with `-dirty` if it was changed; None outside a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="one small case")
    parser.add_argument("--json", type=Path, help="where the result is written")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        case, method = json.loads(options.child)
        print(peak_of_step(Case(**case), method))
        return
    result = {"machine": machine(), "commit": commit()}
    methods, notes = available()
    print(", ".join(f"{key} {value}" for key, value in result["machine"].items()), flush=True)
    rows = [row for case in (QUICK if options.quick else FULL) for row in rows_of(case, methods)]
    result |= {"rows": rows, "ratios": ratios_of(rows), "notes": notes}
    print("\n".join([table(rows), *notes, ""]))
    for name, ratio in result["ratios"].items():
        print(f"{name}: {ratio:.3f}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
