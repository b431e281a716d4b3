"""The administrator's tasks on a cluster that runs."""

import json
import re
import stat
import subprocess
from pathlib import Path

import pytest

from live import ROOT, SERVICES, Invocation, LiveCluster, docker, invoke

UP_AGAIN_S = 10


def _all_containers(cluster: LiveCluster) -> list[str]:
    found = docker("ps", "-q", "--no-trunc").ok().split()
    for worker in cluster.workers:
        found += cluster.on_worker(worker, ["docker", "ps", "-q", "--no-trunc"]).ok().split()
    return sorted(found)


def test_up_again_does_nothing_and_is_quick(cluster: LiveCluster) -> None:
    before = _all_containers(cluster)
    results = [invoke("up", timeout_s=120) for _ in range(2)]
    for result in results:
        result.ok()
        assert "http" in result.stdout, "it ends with the address of Jupyter"
    assert _all_containers(cluster) == before
    assert min(result.seconds for result in results) < UP_AGAIN_S


def test_second_up_at_the_same_time_says_so_and_ends(cluster: LiveCluster) -> None:
    first = Invocation("up")
    first.wait_for_line(bool, timeout_s=60)
    second = invoke("up", timeout_s=60)
    assert first.wait(timeout_s=120).exit_status == 0, first
    if second.exit_status == 0:
        pytest.fail("the second one came too late, or did not see the first")
    assert second.exit_status == 1
    assert "at work" in second.output
    assert str(first.process.pid) in second.output, "it names the process"
    assert "Traceback" not in second.output


def test_up_goes_on_with_its_lines_read_by_nobody(cluster: LiveCluster) -> None:
    command = ["bash", "-c", "./invoke up 2>&1 | head -1; exit ${PIPESTATUS[0]}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in done.stdout + done.stderr
    cluster.wait_until_idle()


def test_status_names_machines_services_and_nodes(cluster: LiveCluster) -> None:
    text = invoke("status").ok()
    for word in (*cluster.workers, *SERVICES, "idle"):
        assert word in text, word
    said = invoke("status", "--json").ok()
    assert isinstance(json.loads(said), dict)
    for word in (*cluster.workers, *SERVICES):
        assert word in said


def test_doctor_finds_nothing_that_must_be_mended(cluster: LiveCluster) -> None:
    result = invoke("doctor", "--json", timeout_s=180)
    found = json.loads(result.stdout)
    assert result.exit_status == 0, result.stdout[-3000:]
    assert found
    assert invoke("doctor", timeout_s=180).exit_status == 0


def test_logs_of_each_service_can_be_read_and_hold_no_secret(cluster: LiveCluster) -> None:
    secrets = [path.read_text(errors="replace").strip() for path in (cluster.config.state_dir / "secrets").iterdir()]
    for service in ("slurmctld", "slurmd", "agent"):
        text = invoke("logs", service).ok()
        assert text.strip(), f"{service} has no log"
        for secret in secrets:
            assert len(secret) > 8
            assert secret not in text
    wrong = invoke("logs", "nothing")
    assert wrong.exit_status == 1
    assert "slurmctld" in wrong.output, "the services that there are"
    assert "Traceback" not in wrong.output


def test_export_logs_writes_a_directory_without_secrets(cluster: LiveCluster, tmp_path: Path) -> None:
    target = tmp_path / "logs"
    invoke("export-logs", str(target), timeout_s=180).ok()
    files = [path for path in target.rglob("*") if path.is_file()]
    text = "".join(path.read_text(errors="replace") for path in files)
    for service in SERVICES:
        assert any(service in path.name for path in files), (service, files)
    for path in (cluster.config.state_dir / "secrets").iterdir():
        assert path.read_text(errors="replace").strip() not in text, path.name


def test_url_is_the_address_with_the_token(cluster: LiveCluster) -> None:
    text = invoke("url").ok().strip()
    assert re.fullmatch(r"http://[^/]+:\d+/\S*token=\w+\S*", text)
    assert cluster.state.secret("jupyter-token").strip() in text


def test_shell_runs_a_command_and_passes_its_exit_status_on(cluster: LiveCluster) -> None:
    assert invoke("shell", "--command", "id -un; sinfo -h -o %P").ok().split()[0] == "jovyan"
    assert invoke("shell", "--user", "test_user1", "--command", "id -un; pwd").ok().split() == [
        "test_user1",
        "/home/test_user1",
    ]
    assert invoke("shell", "--command", "exit 23").exit_status == 23
    assert invoke("shell", "--command", "printf '%s' \"two  words; $USER\"").ok() == "two  words; jovyan"
    wrong = invoke("shell", "--user", "nobody-has-this-name", "--command", "true")
    assert wrong.exit_status == 1
    assert "nobody-has-this-name" in wrong.output
    assert "Traceback" not in wrong.output


def test_secrets_are_root_s_alone(cluster: LiveCluster) -> None:
    state = cluster.config.state_dir
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    harmless = (".pub", ".crt", ".srl", ".log")
    for path in state.rglob("*"):
        if path.is_file() and not path.is_symlink():
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0 or path.suffix in harmless, path
            assert path.stat().st_uid == 0


def test_no_secret_is_an_argument_or_in_the_environment_of_a_process(cluster: LiveCluster) -> None:
    secrets = {path.name: path.read_bytes().strip() for path in (cluster.config.state_dir / "secrets").iterdir()}
    for process in Path("/proc").glob("[0-9]*"):
        for part in ("cmdline", "environ"):
            try:
                data = (process / part).read_bytes()
            except OSError:
                continue
            for name, secret in secrets.items():
                assert secret not in data, f"{name} in {part} of {(process / 'comm').read_text()}"


def test_everything_carries_the_label(cluster: LiveCluster) -> None:
    for kind in ("secret", "config", "service"):
        all_ = docker(kind, "ls", "-q").ok().split()
        ours = docker(kind, "ls", "-q", "--filter", "label=cfiddle.cluster=cfiddle").ok().split()
        assert ours
        names = docker(kind, "inspect", "--format", "{{.Spec.Name}}", *(set(all_) - set(ours))).stdout.split()
        assert not [name for name in names if re.match(r"slurm-stack|cfiddle", name)], kind
    for kind in ("network", "volume"):
        ours = docker(kind, "ls", "--filter", "label=cfiddle.cluster=cfiddle", "--format", "{{.Name}}").ok().split()
        names = docker(kind, "ls", "--format", "{{.Name}}").ok().split()
        assert ours
        assert not [name for name in names if re.match(r"slurm-stack|cfiddle", name) and name not in ours], kind
