"""Names the nodes that a job must avoid from its next start on."""

from __future__ import annotations

from pretrain.launch.slurm import AWAY, answer


def to_avoid(node: str, job: str) -> str:
    """The value of the job's ExcNodeList with `node` added. SLURM lets it be changed only while the job is on its way
    back into the queue. Raises ValueError for a node of another partition, and where too few nodes would be left: the
    job would wait for ever."""
    facts = dict(word.split("=", 1) for word in answer("scontrol", "-o", "show", "job", job).split() if "=" in word)
    partition, needed = facts.get("Partition", ""), int(facts.get("NumNodes", "1").partition("-")[0])
    listed = facts.get("ExcNodeList", "(null)")
    avoided = set() if listed == "(null)" else set(answer("scontrol", "show", "hostnames", listed).split())
    rows = [line.split("|") for line in answer("sinfo", "-h", "-N", "-p", partition, "-o", "%N|%t").splitlines()]
    if node not in {name for name, _ in rows}:
        raise ValueError(f"partition {partition} has no node {node}")
    left = {name for name, state in rows if not state.startswith(AWAY)} - avoided - {node}
    if len(left) < needed:
        raise ValueError(f"only {len(left)} other nodes of partition {partition} are left, and the job needs {needed}")
    return ",".join(sorted(avoided | {node}))
