"""The chart's rendered objects, by property. `make lint` holds them against Kubernetes' schemas."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from server.hosts.prepare import prepare
from server.hosts.serve import serve
from server.http.command import gateway
from server.ops.exporter import HEALTH_PATH

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "concertina"
HELM = ROOT / os.environ.get("HELM", "build/bin/helm")
VALUES = ["values.yaml", *(f"ci/{path.name}" for path in sorted(CHART.glob("ci/*.yaml")))]

pytestmark = pytest.mark.skipif(not HELM.exists(), reason=f"no {HELM}: run make build/bin/helm")
every_values = pytest.mark.parametrize("values", VALUES)

Object = dict[str, Any]


def helm(verb: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(HELM), verb, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@cache
def render(settings: str = "", values: str = "values.yaml", release: str = "demo") -> list[Object]:
    """The objects of the chart with `settings`, as for --set and separated by spaces."""
    sets = [part for setting in settings.split() for part in ("--set", setting)]
    ran = helm("template", release, str(CHART), "--values", str(CHART / values), *sets)
    assert ran.returncode == 0, ran.stderr
    return [each for each in yaml.safe_load_all(ran.stdout) if each]


def only(objects: list[Object], kind: str) -> Object:
    (found,) = (each for each in objects if each["kind"] == kind)
    return found


def pod(objects: list[Object]) -> Object:
    return only(objects, "Deployment")["spec"]["template"]["spec"]


def container(objects: list[Object], name: str) -> Object:
    (found,) = (each for each in pod(objects)["containers"] if each["name"] == name)
    return found


def server(objects: list[Object]) -> Object:
    return container(objects, "server")


def front(objects: list[Object]) -> Object:
    return container(objects, "gateway")


def arguments(objects: list[Object]) -> Object:
    """What `concertina serve` makes of the container's arguments; it refuses those it lacks."""
    return parsed(server(objects), serve)


def front_arguments(objects: list[Object]) -> Object:
    """What `concertina gateway` makes of its container's arguments."""
    return parsed(front(objects), gateway)


def parsed(container: Object, command: Callable[..., None]) -> Object:
    name, *rest = container["args"]
    assert name == command.__name__
    app = typer.Typer()
    app.command(name)(command)
    return typer.main.get_command(app).make_context(name, rest).params


@every_values
def test_every_object_carries_the_release(values: str) -> None:
    for each in render(values=values):
        assert each["metadata"]["labels"]["app.kubernetes.io/instance"] == "demo"


@every_values
def test_selectors_find_the_pods_and_no_others(values: str) -> None:
    def pod_labels(release: str) -> dict[str, str]:
        template = only(render("", values, release), "Deployment")["spec"]["template"]
        labels: dict[str, str] = template["metadata"]["labels"]
        return labels

    fields = {
        "Deployment": "selector",
        "NetworkPolicy": "podSelector",
        "PodDisruptionBudget": "selector",
        "PodMonitor": "selector",
    }
    objects = render(values=values)
    selectors = [only(objects, "Service")["spec"]["selector"]]
    for each in objects:
        if field := fields.get(each["kind"]):
            selectors.append(each["spec"][field]["matchLabels"])
    assert len(selectors) >= 2
    for selector in selectors:
        assert selector.items() <= pod_labels("demo").items()
        assert not selector.items() <= pod_labels("other").items()


@every_values
@pytest.mark.parametrize(
    "ports", ["", "server.port=7001 server.metricsPort=7002 gateway.port=7003"]
)
def test_everybody_means_the_same_ports(values: str, ports: str) -> None:
    objects = render(ports, values)
    container, said, http = server(objects), arguments(objects), front_arguments(objects)
    port, metrics_port, http_port = said["port"], said["metrics_port"], http["port"]
    assert (port, metrics_port, http_port) == ((7001, 7002, 7003) if ports else (9000, 9100, 8000))
    assert said["http_port"] == 0
    named = {
        each["name"]: each["containerPort"]
        for each in [*container["ports"], *front(objects)["ports"]]
    }
    assert named == {"grpc": port, "metrics": metrics_port, "http": http_port}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        if said["tls_cert"]:  # no gRPC probe speaks it
            assert container[probe]["httpGet"] == {"path": HEALTH_PATH, "port": "metrics"}
        else:
            assert container[probe]["grpc"] == {"port": port}
    service = {each["name"]: each for each in only(objects, "Service")["spec"]["ports"]}
    assert {name: each["port"] for name, each in service.items()} == named
    assert all(each["targetPort"] == name for name, each in service.items())
    protocol = "https" if said["tls_cert"] else "kubernetes.io/h2c"
    assert service["grpc"]["appProtocol"] == protocol


def test_the_ports_are_those_of_the_image() -> None:
    exposed = re.search(r"^EXPOSE (.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert exposed
    ports = {
        each["containerPort"]
        for container in pod(render())["containers"]
        for each in container["ports"]
    }
    assert ports == {int(each) for each in exposed[1].split()}


@every_values
def test_it_listens_to_more_than_itself(values: str) -> None:
    objects = render(values=values)
    assert arguments(objects)["host"] == front_arguments(objects)["host"] == "0.0.0.0"


@every_values
def test_it_runs_as_nobody_and_writes_nowhere_but_to_its_volumes(values: str) -> None:
    objects = render(values=values)
    security = pod(objects)["securityContext"]
    assert security["runAsNonRoot"] is True
    assert f"USER {security['runAsUser']}:{security['runAsGroup']}" in dockerfile_lines()
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    for each in [*pod(objects)["containers"], *pod(objects).get("initContainers", [])]:
        assert each["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
    assert pod(objects)["automountServiceAccountToken"] is False
    volumes = {each["name"]: each for each in pod(objects)["volumes"]}
    mounts = {each["mountPath"]: each for each in server(objects)["volumeMounts"]}
    assert volumes[mounts["/tmp"]["name"]]["emptyDir"]["sizeLimit"]
    assert volumes[mounts["/dev/shm"]["name"]]["emptyDir"]["medium"] == "Memory"


def dockerfile_lines() -> list[str]:
    return (ROOT / "Dockerfile").read_text().splitlines()


@pytest.mark.parametrize("replicas", [1, 3])
def test_gpus_are_asked_for_one_a_replica_and_only_when_enabled(replicas: int) -> None:
    settings = f"server.replicas={replicas}"
    limits = server(render(settings))["resources"]["limits"]
    assert set(limits) == {"memory"}
    limits = server(render(f"{settings} gpu.enabled=true"))["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == replicas and "memory" in limits
    limits = server(render("gpu.enabled=true gpu.resource=amd.com/gpu"))["resources"]["limits"]
    assert limits["amd.com/gpu"] == 1 and "nvidia.com/gpu" not in limits


def test_the_gpu_image_is_another() -> None:
    assert server(render())["image"] == "concertina:0.1.0"
    assert server(render("gpu.enabled=true"))["image"] == "concertina:0.1.0-gpu"
    assert server(render("gpu.enabled=true image.tag=x"))["image"] == "concertina:x"


def test_a_pod_of_gpus_is_replaced_without_spare_ones() -> None:
    def rolling(objects: list[Object]) -> Object:
        update: Object = only(objects, "Deployment")["spec"]["strategy"]["rollingUpdate"]
        return update

    assert rolling(render()) == {"maxSurge": 1, "maxUnavailable": 0}
    assert rolling(render("gpu.enabled=true")) == {"maxSurge": 0, "maxUnavailable": 1}


@pytest.mark.parametrize("seconds", [0, 60, 3600])
def test_the_pod_outlives_its_drain(seconds: int) -> None:
    objects = render(f"server.drainSeconds={seconds}")
    (command, sleep) = server(objects)["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep" and arguments(objects)["drain_seconds"] == seconds
    assert front(objects)["lifecycle"] == server(objects)["lifecycle"]
    assert front_arguments(objects)["drain_seconds"] == seconds
    assert pod(objects)["terminationGracePeriodSeconds"] >= seconds + int(sleep) + 20


def test_one_process_without_ray() -> None:
    assert arguments(render())["local"] is False
    assert arguments(render("server.ray=false"))["local"] is True


def test_every_setting_of_the_server_reaches_it() -> None:
    said = {
        "replicas": 2,
        "slots": 3,
        "queueLimit": 1_000_000,
        "queueTokens": 2**33,
        "stateLimitBytes": 2**40,
        "threads": 4,
        "drainSeconds": 5,
    }
    objects = render(" ".join(f"server.{name}={value}" for name, value in said.items()))
    heard = arguments(objects)
    assert list(said.values()) == [heard[re.sub("[A-Z]", r"_\g<0>", name).lower()] for name in said]
    assert (heard["provider"], arguments(render("gpu.enabled=true"))["provider"]) == ("cpu", "cuda")
    extra = render("server.extraArgs={--threads=7}")
    assert arguments(extra)["threads"] == 7


def test_bundles_come_from_the_image_or_from_a_claim() -> None:
    assert not arguments(render())["bundles"]
    settings = "bundles.names={a,b}"
    image = render(settings)
    assert arguments(image)["bundles"] == [Path("/bundles/a"), Path("/bundles/b")]
    assert "bundles" not in {each["name"] for each in pod(image)["volumes"]}
    followed = arguments(render("bundles.watch=true"))
    assert followed["watch"] == Path("/bundles") and not followed["bundles"]
    claim = render(f"{settings} bundles.existingClaim=mine")
    assert server(claim)["args"] == server(image)["args"]
    (mount,) = (each for each in server(claim)["volumeMounts"] if each["name"] == "bundles")
    assert mount == {"name": "bundles", "mountPath": "/bundles", "readOnly": True}
    (volume,) = (each for each in pod(claim)["volumes"] if each["name"] == "bundles")
    assert volume["persistentVolumeClaim"] == {"claimName": "mine", "readOnly": True}


def model(objects: list[Object]) -> Object:
    """The init container that converts."""
    (found,) = pod(objects)["initContainers"]
    assert found["name"] == "model"
    return dict(found)


def mounts(container: Object) -> dict[str, Object]:
    return {each["mountPath"]: each for each in container["volumeMounts"]}


def test_a_pretrained_model_is_prepared_where_the_server_looks_for_it() -> None:
    assert "initContainers" not in pod(render())
    objects = render("model.source=them/Their-1.5B-v2")
    said = parsed(model(objects), prepare)
    assert said["source"] == Path("them/Their-1.5B-v2") and said["state"] == "float32"
    assert arguments(objects)["bundles"] == [said["bundle"]] == [Path("/models/Their-1.5B-v2")]
    into, out_of = (mounts(each(objects))["/models"] for each in (model, server))
    assert into["name"] == out_of["name"] and out_of["readOnly"] and "readOnly" not in into
    both = render("model.source=them/tiny model.name=mine bundles.names={a}")
    assert arguments(both)["bundles"] == [Path("/bundles/a"), Path("/models/mine")]
    assert parsed(model(both), prepare)["bundle"] == Path("/models/mine")


def test_a_model_in_a_file_comes_from_a_claim() -> None:
    objects = render("model.source=/source/all/tiny.Q4_1.gguf model.sourceClaim=files")
    said = parsed(model(objects), prepare)
    assert said["source"] == Path("/source/all/tiny.Q4_1.gguf")
    assert said["bundle"] == Path("/models/tiny.Q4_1")
    mount = mounts(model(objects))["/source"]
    assert mount["readOnly"] is True and "/source" not in mounts(server(objects))
    (volume,) = (each for each in pod(objects)["volumes"] if each["name"] == mount["name"])
    assert volume["persistentVolumeClaim"] == {"claimName": "files", "readOnly": True}


@pytest.mark.parametrize("claim", ["", "kept"])
def test_a_converted_model_is_kept_only_in_a_claim(claim: str) -> None:
    objects = render(f"model.source=them/tiny model.claim={claim} model.disk=7Gi")
    volumes = {each["name"]: each for each in pod(objects)["volumes"]}
    volume = volumes[mounts(model(objects))["/models"]["name"]]
    if claim:
        assert volume["persistentVolumeClaim"] == {"claimName": "kept"}
    else:
        assert volume["emptyDir"] == {"sizeLimit": "7Gi"}
    assert volumes[mounts(model(objects))["/tmp"]["name"]]["emptyDir"] == {"sizeLimit": "20Gi"}
    assert mounts(model(objects))["/tmp"]["name"] != mounts(server(objects))["/tmp"]["name"]


def test_a_model_is_prepared_for_the_device_that_it_is_served_on() -> None:
    objects = render("model.source=them/tiny gpu.enabled=true")
    assert parsed(model(objects), prepare)["state"] == "float16"
    assert "nvidia.com/gpu" not in model(objects)["resources"]["limits"]


def test_the_image_that_converts_is_another() -> None:
    for settings, image in (
        ("", "concertina:0.1.0-convert"),
        ("gpu.enabled=true image.repository=r/c", "r/c:0.1.0-convert"),
        ("image.tag=x model.image.tag=y model.image.repository=z", "z:y"),
    ):
        assert model(render(f"model.source=them/tiny {settings}"))["image"] == image
    stages = [line for line in dockerfile_lines() if line.startswith("FROM ")]
    assert "FROM base AS convert" in stages and stages[-1] == "FROM base"  # the server's is last


def test_only_the_image_that_converts_asks_for_torch() -> None:
    """The lines of Python in the Dockerfile, run: what pip is told to install."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", "")
    asked = {}
    for name, code in re.findall(
        r'AS ([\w-]+)\n(?:(?!FROM ).*\n)*?RUN [^"]*-c "(import tomllib.*?)"', text
    ):
        ran = subprocess.run(
            [sys.executable, "-c", code.replace("${EXTRA}", "cpu")],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        asked[name] = {re.split(r"[\W]", line)[0] for line in ran.stdout.split()}
    assert asked.keys() == {"requirements", "build-convert"}
    assert {"grpcio", "onnxruntime", "ray"} <= asked["requirements"]
    assert "torch" not in asked["requirements"]
    assert {"torch", "safetensors", "gguf", "onnx", "huggingface_hub"} <= asked["build-convert"]


def mounted(objects: list[Object], path: Path) -> str:
    """The secret that holds the file at this path."""
    (mount,) = (
        each for each in server(objects)["volumeMounts"] if each["mountPath"] == str(path.parent)
    )
    assert mount["readOnly"] is True
    (volume,) = (each for each in pod(objects)["volumes"] if each["name"] == mount["name"])
    name: str = volume["secret"]["secretName"]
    return name


def test_keys_and_certificates_come_from_secrets() -> None:
    options = ("keys", "tls_cert", "tls_key", "tls_client_ca")
    assert not any(arguments(render())[option] for option in options)
    closed = render("keys.secret=a tls.secret=b tls.clientSecret=c")
    files = [arguments(closed)[option] for option in options]
    assert [file.name for file in files] == ["keys.json", "tls.crt", "tls.key", "ca.crt"]
    assert [mounted(closed, file) for file in files] == ["a", "b", "b", "c"]
    some = render("keys.secret=a tls.secret=b")
    assert arguments(some)["tls_client_ca"] is None
    assert len(pod(some)["volumes"]) == len(pod(closed)["volumes"]) - 1


def test_a_chat_template_comes_from_a_config_map() -> None:
    assert arguments(render())["chat_template"] is None
    objects = render("server.chatTemplate=chatml")
    file = arguments(objects)["chat_template"]
    assert file.name == "chat_template.jinja"
    (mount,) = (
        each for each in server(objects)["volumeMounts"] if each["mountPath"] == str(file.parent)
    )
    assert mount["readOnly"] is True
    (volume,) = (each for each in pod(objects)["volumes"] if each["name"] == mount["name"])
    assert volume["configMap"] == {"name": "chatml"}
    assert len(pod(objects)["volumes"]) == len(pod(render())["volumes"]) + 1


def test_the_autoscaler_alone_says_how_many_pods() -> None:
    assert only(render("replicaCount=3"), "Deployment")["spec"]["replicas"] == 3
    objects = render("autoscaling.enabled=true")
    assert "replicas" not in only(objects, "Deployment")["spec"]
    target = only(objects, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert target["name"] == only(objects, "Deployment")["metadata"]["name"]


@pytest.mark.parametrize(
    ("setting", "kind"),
    [
        ("networkPolicy.enabled", "NetworkPolicy"),
        ("podDisruptionBudget.enabled", "PodDisruptionBudget"),
        ("podMonitor.enabled", "PodMonitor"),
        ("dashboards.enabled", "ConfigMap"),
        ("prometheusRule.enabled", "PrometheusRule"),
        ("serviceAccount.create", "ServiceAccount"),
    ],
)
def test_what_is_optional_comes_and_goes(setting: str, kind: str) -> None:
    assert only(render(f"{setting}=true"), kind)
    assert kind not in {each["kind"] for each in render(f"{setting}=false")}


def test_only_the_ports_of_the_service_are_let_in() -> None:
    (rule,) = only(render(), "NetworkPolicy")["spec"]["ingress"]
    assert rule == {"ports": [{"port": "grpc"}, {"port": "metrics"}, {"port": "http"}]}


@pytest.mark.parametrize(
    ("secrets", "scheme"),
    [("", "HTTP"), ("tls.secret=a", "HTTPS"), ("tls.secret=a tls.clientSecret=b", None)],
)
def test_the_gateway_finds_its_server_and_is_watched(secrets: str, scheme: str | None) -> None:
    objects = render(f"{secrets} server.port=7001 gateway.plainPort=7004 podMonitor.enabled=true")
    said, http = arguments(objects), front_arguments(objects)
    assert http["upstream"] == f"127.0.0.1:{7004 if secrets else 7001}"
    assert said["plain_port"] == (7004 if secrets else 0)
    for option in ("tls_cert", "tls_key", "tls_client_ca"):
        assert http[option] == said[option]
        assert not http[option] or http[option].parent in {
            Path(each["mountPath"]) for each in front(objects)["volumeMounts"]
        }
    watched = only(objects, "PodMonitor")["spec"]["podMetricsEndpoints"]
    ready, alive = (front(objects)[f"{name}Probe"] for name in ("readiness", "liveness"))
    if scheme is None:  # nobody who asks has a certificate
        assert ready["tcpSocket"] == alive["tcpSocket"] == {"port": "http"}
        assert [each["port"] for each in watched] == ["metrics"]
        return
    assert ready["httpGet"] == {"path": "/health", "port": "http", "scheme": scheme}
    assert alive["httpGet"] == {"path": "/version", "port": "http", "scheme": scheme}
    assert [each["port"] for each in watched] == ["metrics", "http"]
    assert watched[1].get("scheme", "http") == scheme.lower()


def test_the_gateway_holds_no_keys_and_takes_its_limits() -> None:
    objects = render("keys.secret=a gateway.maxBodyBytes=2000000 gateway.streamsPerKey=7")
    assert [each["mountPath"] for each in front(objects)["volumeMounts"]] == ["/tmp"]
    said = front_arguments(objects)
    assert (said["max_body_bytes"], said["streams_per_key"]) == (2_000_000, 7)
    extra = render("gateway.extraArgs={--slow-reader-seconds=9}")
    assert front_arguments(extra)["slow_reader_seconds"] == 9


def test_without_a_gateway_nothing_speaks_of_it() -> None:
    settings = "gateway.enabled=false tls.secret=a podMonitor.enabled=true"
    objects = render(settings)
    assert [each["name"] for each in pod(objects)["containers"]] == ["server"]
    assert arguments(objects)["plain_port"] == arguments(objects)["http_port"] == 0
    assert "http" not in {each["name"] for each in only(objects, "Service")["spec"]["ports"]}
    assert {"port": "http"} not in only(objects, "NetworkPolicy")["spec"]["ingress"][0]["ports"]
    (watched,) = only(objects, "PodMonitor")["spec"]["podMetricsEndpoints"]
    assert watched["port"] == "metrics"


def test_without_an_account_of_its_own_the_pod_uses_a_named_one() -> None:
    assert pod(render("serviceAccount.create=false"))["serviceAccountName"] == "default"
    name = only(render(), "ServiceAccount")["metadata"]["name"]
    assert pod(render())["serviceAccountName"] == name


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("server.port=http", "server/port"),
        ("server.port=80", "server/port"),
        ("server.slots=0", "server/slots"),
        ("server.ray=false server.replicas=2", "server/replicas"),
        ("server.prot=9000", "prot"),
        ("tls.clientSecret=c", "tls/secret"),
        ("keys.file=keys.json", "keys"),
        ("gateway.port=80", "gateway/port"),
        ("replicas=2", "replicas"),
        ("bundles.names={../etc}", "bundles/names"),
        ("bundles.names={a} bundles.watch=true", "bundles/names"),
        ("gpu.enabled=yes", "gpu/enabled"),
        ("resources.limits.nvidia\\.com/gpu=1", "resources/limits"),
        ("service.type=ExternalName", "service/type"),
        ("image.pullPolicy=Sometimes", "image/pullPolicy"),
        ("model.source=typo", "model/source"),
        ("model.source=/etc/passwd", "model/source"),
        ("model.source=/source/../etc/passwd model.sourceClaim=a", "model/source"),
        ("model.source=/source/tiny", "model/sourceClaim"),
        ("model.source=a/b bundles.watch=true", "model/source"),
        ("model.name=a/b", "model/name"),
        ("probes.liveness.port=1", "probes/liveness"),
    ],
)
def test_bad_values_are_refused(setting: str, complaint: str) -> None:
    sets = [part for each in setting.split() for part in ("--set", each)]
    ran = helm("template", "demo", str(CHART), *sets)
    assert ran.returncode != 0
    assert complaint in ran.stderr, ran.stderr


def test_every_value_is_described() -> None:
    """A value without an entry in the schema would be refused; one without a default is hidden."""
    schema = yaml.safe_load((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert set(values) == set(schema["properties"]) - {"global"}
    for name, part in schema["properties"].items():
        if "properties" in part:
            assert set(values[name]) == set(part["properties"]), name


def test_old_clusters_are_refused() -> None:
    ran = helm("template", "demo", str(CHART), "--kube-version", "1.26.0")
    assert ran.returncode != 0 and "kubeVersion" in ran.stderr


def test_chart_and_project_are_of_one_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert f'version = "{chart["appVersion"]}"' in (ROOT / "pyproject.toml").read_text()


def test_the_notes_name_the_service_and_its_port() -> None:
    ran = helm("install", "demo", str(CHART), "--dry-run=client", "--set", "server.port=7001")
    assert ran.returncode == 0, ran.stderr
    notes = ran.stdout.split("NOTES:")[1]
    (forward,) = (line for line in notes.splitlines() if "port-forward" in line)
    assert "service/demo-concertina" in shlex.split(forward)
    assert "7001:7001" in shlex.split(forward)
