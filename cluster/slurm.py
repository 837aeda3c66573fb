"""The batch script that runs a spec on a Slurm cluster: it starts Ray over the allocation and the job on it.

    print(slurm_script(spec, "job.yaml", shape=shape_of(spec, Options())))

The driver runs on the allocation's first node, where Slurm runs the script. Whatever ends it, a lost node, a
preemption or the end of its time, the next turn continues there: what was committed is not made again.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from overtone.cluster.kubernetes import Shape
from overtone.jobs.errors import UserError
from overtone.jobs.spec import JobSpec, is_url

_NOTICE_S = 120
"""How long before the end of its time the script is told. The batches in hand are lost with it."""

_BODY = """\
set -euo pipefail

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))
# Only those who know it may use this Ray: other users of the cluster can reach its ports.
RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(od -An -N 32 -t x1 /dev/urandom | tr -d ' \\n')
RAY_TMPDIR="/tmp/ray-$SLURM_JOB_ID"
export RAY_AUTH_MODE RAY_AUTH_TOKEN RAY_TMPDIR
mkdir -p "$RAY_TMPDIR"

# Before its time is up the job asks for another turn, which ends this one.
trap 'scontrol requeue "$SLURM_JOB_ID" || true' USR1
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT

# For the background alone: it becomes the srun that is killed at the end.
on_node() {{
  exec srun --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 "$@"
}}
ray_here=(ray start --block --disable-usage-stats --num-cpus={cpus} --num-gpus={gpus})

on_node --nodes=1 --nodelist="$head" \\
  "${{ray_here[@]}}" --head --port="$port" --include-dashboard=false &
ray_head=$!
until ray health-check --address "$head:$port" > /dev/null 2>&1; do
  kill -0 "$ray_head" 2> /dev/null || {{ echo "Ray did not start on $head" >&2; exit 1; }}
  sleep 2
done
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
  on_node --nodes=$((SLURM_JOB_NUM_NODES - 1)) --exclude="$head" \\
    "${{ray_here[@]}}" --address="$head:$port" &
fi

{run} --address "$head:$port" &
driver=$!
code=0
wait "$driver" || code=$?
# A signal ends a `wait`, not the driver.
while kill -0 "$driver" 2> /dev/null; do code=0; wait "$driver" || code=$?; done
exit "$code"
"""


def slurm_script(
    spec: JobSpec,
    spec_path: str | Path,
    overrides: Sequence[str] = (),
    *,
    shape: Shape,
    partition: str | None = None,
    account: str | None = None,
    time: str | None = None,
) -> str:
    """The text of an sbatch script. `shape` says how many nodes of which size; `time` is Slurm's `--time`.

    The nodes must see the spec, this environment, and local paths under the same names. UserError for an
    output that each node would have of its own.
    """
    local = not is_url(spec.output.path) and Path(spec.output.path).is_relative_to("/tmp")
    if local and shape.max_pods > 1:
        raise UserError(
            f"output.path is {spec.output.path}, and each node has a /tmp of its own; name a folder that all "
            "nodes share, or s3://"
        )
    nodes = f"{shape.min_pods}-{shape.max_pods}" if shape.max_pods > shape.min_pods else f"{shape.min_pods}"
    asked = {
        "job-name": f"overtone-{spec.name}",
        "nodes": nodes,
        "ntasks-per-node": "1",
        "cpus-per-task": str(shape.cpus),
        "gpus-per-node": str(shape.gpus) if shape.gpus else None,
        "mem": f"{shape.memory_gib}G",
        "partition": partition,
        "account": account,
        "time": time,
        "chdir": str(Path.cwd()),
        "output": f"{spec.name}-%j.log",
        "open-mode": "append",
        "signal": f"B:USR1@{_NOTICE_S}",
    }
    run = ["overtone", "run", str(Path(spec_path).expanduser().absolute())]
    run += [word for override in overrides for word in ("--set", override)]
    lines = ["#!/bin/bash"]
    lines += [
        f"#SBATCH --{key}={_directive(key, value)}" for key, value in asked.items() if value is not None
    ]
    lines += [
        "#SBATCH --requeue",
        "# Submit it with sbatch. All nodes must see the spec, the output and the environment below.",
        f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"',
    ]
    return "\n".join(lines) + "\n" + _BODY.format(cpus=shape.ray_cpus, gpus=shape.gpus, run=shlex.join(run))


def _directive(key: str, value: str) -> str:
    """As `#SBATCH` lines take it, which no shell reads."""
    if any(character in value for character in "\n\r\"'\\"):
        raise UserError(f"--{key} would be {value!r}; Slurm takes no quotes, backslashes and line ends there")
    return f'"{value}"' if " " in value else value
