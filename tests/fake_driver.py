"""A driver with the fake engine as a process of its own, for tests that kill it:

python fake_driver.py SPEC.json ADDRESS STEP_S PIDS_FOLDER   (ADDRESS "local" starts a Ray of its own)
"""

from __future__ import annotations

import sys
from pathlib import Path

from overtone.cluster.submit import use_token
from overtone.jobs.spec import JobSpec


def main(spec_path: str, address: str, step_s: str, pids: str) -> int:
    use_token()  # before ray is imported
    import fake_engine
    import ray.cloudpickle

    from overtone.cluster.driver import run_job

    ray.cloudpickle.register_pickle_by_value(fake_engine)
    summary = run_job(
        JobSpec.from_json(Path(spec_path).read_text()),
        address=None if address == "local" else address,
        engine_factory=fake_engine.Fakes(float(step_s), pids),
    )
    print(summary.text(), flush=True)
    return summary.exit_code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
