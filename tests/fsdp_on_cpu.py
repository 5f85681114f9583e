"""A training run under FSDP2 on CPU processes, which accelerate would quietly turn into DDP: for test_kill.py alone.

torchrun --nproc_per_node 2 tests/fsdp_on_cpu.py '{"experiment_dir": ...}'
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch.distributed as dist
import yaml
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from src.distillation import training
from src.distillation.kd import run_kd_pipeline
from src.utils.common import setup_logging

original = AcceleratorState.__init__


def with_fsdp(self, *arguments, fsdp_plugin=None, **keywords):
    original(self, *arguments, fsdp_plugin=fsdp_plugin, **keywords)
    plugin = fsdp_plugin or self.__dict__.get("fsdp_plugin")
    if plugin is not None:
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = plugin


take_step = training.take_step


def sharded_step(run):
    kinds = {type(parameter.data) for parameter in run.wrapped.parameters()}
    assert kinds == {DTensor}, kinds
    return take_step(run)


AcceleratorState.__init__ = with_fsdp
training.take_step = sharded_step
shipped = yaml.safe_load((Path(__file__).resolve().parents[1] / "configs/accelerate/fsdp2.yaml").read_text())
os.environ["ACCELERATE_USE_FSDP"] = "true"  # as `accelerate launch --config_file` hands the file on
os.environ |= {key.upper(): str(value).lower() for key, value in shipped["fsdp_config"].items() if "_policy" not in key}
os.environ |= {"FSDP_AUTO_WRAP_POLICY": shipped["fsdp_config"]["fsdp_auto_wrap_policy"]}
setup_logging()
run_kd_pipeline(json.loads(sys.argv[1]))
assert dist.get_world_size() == 2
