"""What share of a device's stated rate the stages reach: the only numbers in a time that are not counted.

Each is a range, from what is slow to what was seen. Rates are those of the data sheets (hardware.py), or on a processor
the product rate that is measured when the plan is made.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    low: float
    high: float
    source: str


# Training. One H200, Qwen3-8B's shapes: 50 to 58 % of the rate that its products reach alone, which is 750 of the data
# sheet's 989 TFLOP/s; the low end leaves room for short passes and other cards.
TRAINING = Range(0.25, 0.45, "H200, Qwen3-8B: body and loss at 50-58 % of the products' 750 of 989 TFLOP/s")
# A mixture of experts reads in groups of tokens, one product an expert: smaller products than a dense model's.
READING = Range(0.10, 0.40, "as training for dense models; grouped experts run smaller products")
# Decoding is bound by memory: every step reads the weights. vLLM's own kernels reach half to four fifths.
DECODING = Range(0.35, 0.75, "share of the memory's bandwidth; weights and keys are read once a step")
# A processor: benchmarks/train_step.py found 58 to 62 % of the product rate measured in the same run.
CPU_TRAINING = Range(0.40, 0.65, "two cores: 58-62 % of the product rate of the same run")
CPU_READING = Range(0.40, 0.75, "two cores, as training without its backward pass")
# benchmarks/teacher_generation.py: 331 tokens/s of a 135M model, 89 of about 690 GFLOP/s with AMX; more without AMX,
# whose products are slower while all else is not
CPU_DECODING = Range(0.08, 0.40, "two cores, 331 tokens/s of SmolLM2-135M: 13 % with AMX")

# Seconds a layer and decoding step that transformers' `generate` needs to start kernels; H200, 135M: 850 tokens/s at
# 256 rows are at most 10 ms a layer with everything, half the rows having ended
LAUNCH_SECONDS = Range(0.0005, 0.004, "transformers starts each kernel from Python")
# Seconds of a server's step beside its reads: scheduling, sampling, all-reduce
SERVER_SECONDS = Range(0.004, 0.02, "CUDA graphs; scheduling, sampling and all-reduce remain")
# Reading weights from disk, GB a second; and the seconds in which a stage or a server starts
LOADING = Range(0.5, 3.0, "a network disk to a local NVMe")
START_SECONDS = Range(15, 60, "imports, CUDA, compiling the loss kernel")
SERVER_START_SECONDS = Range(60, 300, "vLLM compiles and captures its graphs")
# GB a second over PCIe, 4.0 x16 (32 GB/s by its specification)
STREAMING = Range(10.0, 24.0, "PCIe 4.0 x16")

SAID = (
    f"time: {TRAINING.low:.0%} to {TRAINING.high:.0%} of the data sheet's bf16 rate in training, {READING.low:.0%} to "
    f"{READING.high:.0%} in reading, {DECODING.low:.0%} to {DECODING.high:.0%} of its bandwidth in decoding "
    "(src/planning/utilisation.py says from where)"
)
