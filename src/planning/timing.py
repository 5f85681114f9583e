"""Operations and bytes -> seconds, at best and at worst; see utilisation.py for the ranges."""

from src.planning import utilisation
from src.planning.hardware import Hardware
from src.planning.utilisation import Range

GB = 1e9


def hours(low: float, high: float) -> tuple[float, float]:
    """Seconds -> hours."""
    return low / 3600, high / 3600


def computing(work: float, hardware: Hardware, on_gpu: Range, on_cpu: Range, devices: int = 1) -> tuple[float, float]:
    """Seconds, at best and at worst, of so many operations on so many devices at once."""
    share = on_cpu if hardware.is_cpu else on_gpu
    rate = hardware.device.tflops * 1e12 * devices
    return work / (rate * share.high), work / (rate * share.low)


def starting(weight_bytes: float, start: Range = utilisation.START_SECONDS) -> tuple[float, float]:
    """Seconds until a stage that loads so many bytes begins to work."""
    loading = utilisation.LOADING
    return start.low + weight_bytes / GB / loading.high, start.high + weight_bytes / GB / loading.low


def longer(one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    """Of what goes on at the same time."""
    return max(one[0], other[0]), max(one[1], other[1])


def added(*seconds: tuple[float, float]) -> tuple[float, float]:
    return sum(low for low, _ in seconds), sum(high for _, high in seconds)
