"""The two-node examples for Slurm, run with a Slurm of scripts: every command that would be started, and its flags."""

import subprocess
import time
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser

from src.distillation.engines import EngineSettings
from src.distillation.kd_config import KDConfig
from src.utils.common import ROOT
from src.utils.config import build_config, hardware_argument, profile_argument, read_profile

EXAMPLES = sorted((ROOT / "configs" / "slurm").glob("*.sbatch"))
# https://docs.vllm.ai/en/latest/serving/data_parallel_deployment/ and .../cli/serve/
VLLM_FLAGS = {
    "--tensor-parallel-size", "--data-parallel-size", "--data-parallel-size-local", "--data-parallel-address",
    "--data-parallel-rpc-port", "--data-parallel-start-rank", "--headless", "--enable-expert-parallel",
    "--max-model-len", "--host", "--port",
}  # fmt: skip
SCONTROL = "#!/usr/bin/env bash\nprintf 'node-a\\nnode-b\\n'\n"
# srun of one task runs it; of the whole job, once for each node
SRUN = """#!/usr/bin/env bash
node=all
while [[ "$1" == --* ]]; do [[ "$1" == --nodelist=* ]] && node="${1#*=}"; shift; done
if [ "$1" = hostname ]; then echo "10.0.0.1 10.1.0.1"; exit 0; fi
if [ "$node" = all ]; then SLURM_NODEID=0 "$@" && SLURM_NODEID=1 "$@"; exit $?; fi
NODE="$node" exec "$@"
"""
SAY = '#!/usr/bin/env bash\nprintf \'%s\\n\' "${NODE:-}" "$@" > said_$(basename "$0")_${NODE:-$SLURM_NODEID}\n'


@pytest.fixture
def slurm(tmp_path):
    """`slurm(name, *arguments)`: run an example in an empty folder; what each command there was given."""
    pause = 'exec /bin/sleep $([ "$1" = 10 ] && echo 0.05 || echo "$1")'
    programs = {"bin/scontrol": SCONTROL, "bin/srun": SRUN, ".venv/bin/accelerate": SAY,
                ".venv/bin/python": SAY + "echo $$ > pid_stage\nexec sleep ${STAGE_SECONDS:-0}\n",
                ".venv-vllm/bin/vllm": SAY + "echo $$ > pid_$NODE\nexec sleep 60\n",
                "bin/curl": "#!/usr/bin/env bash\n[ -e pid_node-a ] && [ -e pid_node-b ]\n",
                "bin/sleep": f"#!/usr/bin/env bash\n{pause}\n"}  # fmt: skip
    for name, text in programs.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def run(name: str, *arguments: str, ended_early: bool = False) -> dict[str, list[str]]:
        environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node-[a-b]",
                       "STAGE_SECONDS": "60" if ended_early else "0"}  # fmt: skip
        command = ["bash", str(ROOT / "configs" / "slurm" / f"{name}.sbatch"), *arguments]
        job = subprocess.Popen(command, cwd=tmp_path, env=environment)
        while ended_early and not (tmp_path / "pid_stage").exists():
            time.sleep(0.02)
        if ended_early:
            job.terminate()
        assert job.wait(timeout=30) == (143 if ended_early else 0)
        given = {}
        for path in sorted(tmp_path.glob("said_*")):
            given[path.name.removeprefix("said_")] = path.read_text().splitlines()[1:]
        return given

    return run


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_bash_can_read_it(path):
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    assert "#SBATCH --nodes=2" in path.read_text()


def test_training_on_two_nodes(slurm):
    given = slurm("train_two_nodes", "--alpha", "0")
    assert given.keys() == {"accelerate_0", "accelerate_1"}
    for node in (0, 1):
        launch, *words = given[f"accelerate_{node}"]
        assert launch == "launch"
        asked = launch_command_parser().parse_args(words)  # refuses flags that accelerate does not have
        assert (asked.num_machines, asked.num_processes, asked.machine_rank) == (2, 16, node)
        assert (asked.main_process_ip, asked.main_process_port, asked.rdzv_backend) == ("10.0.0.1", 29500, "c10d")
        fsdp = yaml.safe_load((ROOT / asked.config_file).read_text())
        assert (fsdp["distributed_type"], fsdp["fsdp_config"]["fsdp_version"]) == ("FSDP", 2)
        assert asked.training_script == "scripts/run_improved_kd.py"
        profile = ROOT / profile_argument(asked.training_script_args)
        values = read_profile(profile, "run_improved_kd", KDConfig)
        config = build_config(KDConfig, values, asked.training_script_args)
        assert (config.alpha, config.rows_per_step % asked.num_processes, config.student_devices) == (0, 0, [])


def flags(words: list[str]) -> dict[str, str]:
    """Flag -> its value, empty for a switch."""
    found = {}
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("--"):
            found[word] = "" if following.startswith("--") else following
    return found


@pytest.mark.parametrize("ended_early", [False, True])
def test_nothing_outlives_the_job(slurm, tmp_path, ended_early):
    slurm("answers_two_nodes", ended_early=ended_early)
    for name in ("node-a", "node-b", "stage"):
        pid = int((tmp_path / f"pid_{name}").read_text())
        assert not Path(f"/proc/{pid}").exists(), name


def test_answers_of_a_server_on_two_nodes(slurm):
    given = slurm("answers_two_nodes")
    head, other, stage = (given[name] for name in ("vllm_node-a", "vllm_node-b", "python_node-a"))
    profile = ROOT / profile_argument(stage)
    teacher = yaml.safe_load(profile.read_text())["teacher_model_name_or_path"]
    assert head[:2] == other[:2] == ["serve", teacher]
    shared, first, second = flags(head).items() & flags(other).items(), flags(head), flags(other)
    assert {*first, *second} <= VLLM_FLAGS
    said = dict(shared)
    assert (said["--tensor-parallel-size"], said["--data-parallel-size"]) == ("2", "8")
    assert said["--data-parallel-size-local"] == second["--data-parallel-start-rank"] == "4"
    assert said["--data-parallel-address"] == "10.0.0.1"
    assert ("--headless" in second, "--headless" in first) == (True, False)
    for size in ("--tensor-parallel-size", "--data-parallel-size-local"):
        assert 8 % int(said[size]) == 0  # of a node's GPUs
    assert hardware_argument(stage) == "none"
    config = build_config(EngineSettings, argv=stage[1:])
    assert (config.engine, config.server) == ("openai", "vllm")
    assert config.base_url == f"http://10.0.0.1:{first['--port']}/v1"
