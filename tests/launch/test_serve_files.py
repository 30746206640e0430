"""launch/serve: what the image and the Kubernetes files say is what the server offers. The files have also passed
hadolint, kubectl kustomize and kubernetes-validate --strict, which need a network or a download of their own."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from pretrain.serve import PORT, main
from pretrain.serving.limits import Limits

ROOT = Path(__file__).parents[2]
SERVE = ROOT / "launch" / "serve"
DOCKERFILE = (SERVE / "Dockerfile").read_text()


def manifest(name: str) -> dict:
    return yaml.safe_load((SERVE / f"{name}.yaml").read_text())


def pod() -> dict:
    return manifest("deployment")["spec"]["template"]["spec"]


def container() -> dict:
    (only,) = pod()["containers"]
    return only


def test_the_kustomization_names_every_file_and_the_image_of_the_deployment():
    listed = manifest("kustomization")
    assert {"kustomization.yaml", *listed["resources"]} == {path.name for path in SERVE.glob("*.yaml")}
    assert container()["image"] == listed["images"][0]["name"] == "imglish-serve"
    names = {manifest(name)["metadata"]["name"] for name in ("deployment", "service", "disruption")}
    assert names == {"imglish-serve"}


def test_labels_and_ports_lead_from_the_service_to_the_server():
    (port,), spec = container()["ports"], manifest("deployment")["spec"]
    args = container()["args"]
    assert port["containerPort"] == PORT == int(args[args.index("--port") + 1]) and args[:3] == [
        "/weights",
        "--host",
        "0.0.0.0",
    ]
    assert [each["targetPort"] for each in manifest("service")["spec"]["ports"]] == [port["name"]]
    labels = spec["template"]["metadata"]["labels"]
    selectors = [spec["selector"], manifest("disruption")["spec"]["selector"]]
    assert all(each["matchLabels"] == labels for each in selectors)
    assert manifest("service")["spec"]["selector"] == labels
    notes = spec["template"]["metadata"]["annotations"]
    assert (notes["prometheus.io/port"], notes["prometheus.io/path"]) == (str(PORT), "/metrics")


def test_arguments_are_those_of_the_command(capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["--help"])
    known = set(re.findall(r"--[a-z0-9-]+", capsys.readouterr().out))
    assert {word for word in container()["args"] if word.startswith("--")} <= known


def test_probes_ask_a_path_that_exists():
    from pretrain.serving import app

    source = Path(app.__file__).read_text()
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe = container()[name]["httpGet"]
        assert probe == {"path": "/health", "port": "http"} and f'"{probe["path"]}"' in source
    alive = container()["livenessProbe"]
    assert alive["periodSeconds"] * alive["failureThreshold"] > Limits.seconds  # busy is not dead


def test_a_pod_that_ends_has_time_for_what_is_at_work():
    before = int(container()["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod()["terminationGracePeriodSeconds"] >= before + Limits.seconds + Limits.body_seconds + 1


def test_nothing_can_be_written_or_gained():
    inside = container()["securityContext"]
    assert inside["readOnlyRootFilesystem"] and not inside["allowPrivilegeEscalation"]
    assert inside["capabilities"] == {"drop": ["ALL"]} and pod()["automountServiceAccountToken"] is False
    user = str(pod()["securityContext"]["runAsUser"])
    assert pod()["securityContext"]["runAsNonRoot"] and f"USER {user}:" in DOCKERFILE
    mounts = {each["name"]: each for each in container()["volumeMounts"]}
    assert mounts["weights"]["readOnly"] and mounts["weights"]["mountPath"] == "/weights"
    assert {each["name"] for each in pod()["volumes"]} == set(mounts)


def test_the_image_installs_what_setup_installs_and_copies_what_is_there():
    wanted = re.search(r"version=torch==([\d.]+)", (ROOT / "launch/env/setup.sh").read_text())
    assert wanted is not None and f"ARG TORCH_VERSION={wanted[1]}\n" in DOCKERFILE
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    chosen = re.search(r'"\.\[([a-z,]+)\]"', DOCKERFILE)
    assert chosen is not None and "serve" in (names := set(chosen[1].split(","))) and names <= set(extras)
    assert f"EXPOSE {PORT}\n" in DOCKERFILE and f"127.0.0.1:{PORT}/health" in DOCKERFILE
    context = [line[1:] for line in (SERVE / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"]
    assert all((ROOT / name).exists() for name in context) and "launch/env/constraints.txt" in context


def test_every_dependency_of_serving_is_pinned():
    pinned = set(re.findall(r"^([A-Za-z0-9_.-]+)==", (ROOT / "launch/env/constraints.txt").read_text(), re.M))
    assert {"fastapi", "starlette", "uvicorn", "h11", "click", "anyio", "idna", "pydantic"} <= pinned
