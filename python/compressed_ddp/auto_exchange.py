"""exchange="auto": what it may be told, and what it measures."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
import weakref

import torch
import torch.distributed as dist

from . import ops
from ._native import _C

SPARSE = ("allgather", "split")
DENSE = ("dense", "dense_fp32", "dense_bf16", "dense_fp16")

# What is timed: all-gathers in which each rank sends this much, and the stages on one tensor. The largest decides the slope: with 1 MiB
# and five repeats it varied by a factor of 50 between measurements of an unshaped network, now by 15 %.
_SENT_BYTES = (1 << 14, 1 << 19, 1 << 23)
_STAGE_NUMEL = 1 << 20
_REPEATS = 9
# Of the CUDA stages no times are known before they have run. Bytes of device memory per entry as counted on interpreted kernels
# (benchmarks/results/count_cuda.json): compensate_select_ with encode, and decode_apply_; of a selected entry a sector of 32 bytes.
_SELECT_ENTRY_BYTES, _DECODE_ENTRY_BYTES, _DECODE_SELECTED_BYTES = 12.7, 4.0, 32.0


@dataclasses.dataclass(frozen=True)
class ExchangeCosts:
    """What rank 0 has measured, or was told, and all ranks go by: in seconds."""

    latency_s: float
    """Of one collective."""
    byte_s: float
    """Of one byte that a rank sends in a large collective."""
    select_entry_s: float
    """compensate_select_ and encode, per entry of the bucket."""
    decode_entry_s: float
    """decode_apply_, per entry of the bucket."""
    decode_selected_s: float
    """And per selected entry of every payload."""

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not 0 < value < math.inf:
                raise ValueError(
                    f"ExchangeCosts: {name} must be a positive, finite number of seconds, got {value!r}"
                )

    def as_tuple(self) -> tuple[float, float, float, float, float]:
        """All of them in this order."""
        return (
            float(self.latency_s),
            float(self.byte_s),
            float(self.select_entry_s),
            float(self.decode_entry_s),
            float(self.decode_selected_s),
        )


# Of the process groups that are alive.
_measured: weakref.WeakKeyDictionary[
    dist.ProcessGroup, dict[tuple[str, float, str], ExchangeCosts]
] = weakref.WeakKeyDictionary()


@dataclasses.dataclass(frozen=True)
class AutoExchange:
    """`TopKEFState(exchange=AutoExchange(...))`: exchange="auto" with some of its choices made.

    Args:
        sparse: how compressed buckets travel: "allgather" or "split". None: as exchange=None, by the world size alone. It is never chosen
            by measurements, because it decides what is selected.
        dense: how the other buckets travel: "dense", "dense_fp32", "dense_bf16" or "dense_fp16".
        costs: in place of measurements: with them a run can be repeated. None: measured in the first compressed step.

    Raises:
        ValueError: another name.
    """

    sparse: str | None = None
    dense: str = "dense"
    costs: ExchangeCosts | None = None

    def __post_init__(self) -> None:
        if self.sparse is not None and self.sparse not in SPARSE:
            raise ValueError(
                f"AutoExchange: sparse must be None or one of {SPARSE}, got {self.sparse!r}"
            )
        if self.dense not in DENSE:
            raise ValueError(f"AutoExchange: dense must be one of {DENSE}, got {self.dense!r}")
        if self.costs is not None and not isinstance(self.costs, ExchangeCosts):
            raise ValueError(
                f"AutoExchange: costs must be None or ExchangeCosts(...), got {self.costs!r}"
            )


def measure_costs(
    process_group: dist.ProcessGroup, device: torch.device, density: float, value_format: str
) -> ExchangeCosts:
    """A collective of all ranks: what rank 0 has measured, on every rank.

    Once per process group (and type of device, density and value format): a state that comes later gets the same, if rank 0 still knows
    them. The first time it takes about as long as sending 90 MB from each rank.
    """
    measured_before = _measured.setdefault(process_group, {})
    what = (device.type, density, value_format)
    known = [measured_before.get(what)]
    dist.broadcast_object_list(known, group=process_group, group_src=0, device=device)
    costs = known[0] or _measure_costs(process_group, device, density, value_format)
    measured_before[what] = costs
    return costs


def _measure_costs(
    process_group: dist.ProcessGroup, device: torch.device, density: float, value_format: str
) -> ExchangeCosts:
    latency_s, byte_s = _collectives(process_group, device)
    if _C.has_cuda_stages(device):
        byte_of_memory_s = 1 / _memory_bytes_per_s(device)
        stages = [
            count * byte_of_memory_s
            for count in (_SELECT_ENTRY_BYTES, _DECODE_ENTRY_BYTES, _DECODE_SELECTED_BYTES)
        ]
    else:
        stages = _stages_on_cpu(density, value_format)
    measured = torch.tensor([latency_s, byte_s, *stages], dtype=torch.float64, device=device)
    dist.broadcast(measured, group=process_group, group_src=0)
    return ExchangeCosts(*measured.tolist())


def _collectives(process_group: dist.ProcessGroup, device: torch.device) -> tuple[float, float]:
    """Least squares through medians: seconds of a collective, and of one byte more."""
    world_size = process_group.size()
    sent_bytes, seconds = [], []
    for total in _SENT_BYTES:
        size = max(8, total // max(1, world_size - 1) // 8 * 8)
        mine = torch.zeros(size, dtype=torch.uint8, device=device)
        gathered = torch.empty(world_size * size, dtype=torch.uint8, device=device)

        def gather(gathered: torch.Tensor = gathered, mine: torch.Tensor = mine) -> None:
            dist.all_gather_into_tensor(gathered, mine, group=process_group)

        sent_bytes.append(float((world_size - 1) * size))
        seconds.append(_median_s(gather, device))
    mean_x, mean_y = statistics.fmean(sent_bytes), statistics.fmean(seconds)
    spread = sum((x - mean_x) ** 2 for x in sent_bytes)
    if spread == 0:  # one rank: nothing is sent
        return max(mean_y, 1e-9), 1e-15
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(sent_bytes, seconds)) / spread
    if slope <= 0:  # a loaded machine: rather too much than nothing
        slope = seconds[-1] / sent_bytes[-1]
    # Large sizes say little of the latency: what the smallest took beside its bytes.
    return max(seconds[0] - slope * sent_bytes[0], 1e-9), slope


def _stages_on_cpu(density: float, value_format: str) -> list[float]:
    numel = _STAGE_NUMEL
    k = _C.selection_k(density, numel)
    layout = ([numel], [0], [k])
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(numel, generator=generator, dtype=torch.float32, device="cpu")
    residual, bucket = torch.zeros_like(gradient), torch.empty_like(gradient)

    def select(rank: int = 0) -> torch.Tensor:
        values, indices, _ = ops.compensate_select_(gradient, residual, *layout)
        return ops.encode(
            values,
            indices,
            gradient,
            *layout,
            value_format=value_format,
            residual=residual,
            rank=rank,
        )

    cpu = torch.device("cpu")
    select_s = _median_s(select, cpu)
    counts = (1, 8)
    payloads = torch.stack([select(rank) for rank in range(max(counts))])
    decode_s = []
    for count in counts:
        gathered = payloads[:count]

        def decode(gathered: torch.Tensor = gathered) -> None:
            ops.decode_apply_(bucket, gathered, *layout, value_format=value_format)

        decode_s.append(_median_s(decode, cpu))
    selected_s = (decode_s[1] - decode_s[0]) / ((counts[1] - counts[0]) * k)
    if selected_s <= 0:  # a loaded machine: as with the slope
        selected_s = decode_s[1] / (counts[1] * k)
    entry_s = max((decode_s[0] - k * selected_s) / numel, 1e-15)
    return [select_s / numel, entry_s, selected_s]


def _median_s(function: object, device: torch.device) -> float:
    assert callable(function)
    seconds = []
    for _ in range(1 + _REPEATS):  # the first warms up
        begin = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


def _memory_bytes_per_s(device: torch.device) -> float:
    if device.type != "cuda":  # interpreted kernels
        return 1e9
    properties = torch.cuda.get_device_properties(device)
    clock_khz = getattr(properties, "memory_clock_rate", 0)
    bus_bits = getattr(properties, "memory_bus_width", 0)
    # Twice per clock; where torch does not tell, a middling GPU's.
    return 2e3 * clock_khz * bus_bits / 8 or 1e12
